"""A trained model: photos -> heads -> panoptic maps.

From Python:

    from panoptic_cache.evaluate.predict import Predictor
    predictor = Predictor("runs/train")
    result = predictor(["photo.jpg"])[0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode
from panoptic_cache.evaluate.decoder.tiles import paste, stitch
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.photo import Fit, fitted_size, read_photo, resize_photo
from panoptic_cache.pipeline.pictures import Picture, centroid_colours, semantic_colours
from panoptic_cache.pipeline.sources import as_pixels
from panoptic_cache.pipeline.tiles import Window, check_tile, windows
from panoptic_cache.train.checkpoint import TrainState, Weights, find_checkpoint
from panoptic_cache.train.config import Precision
from panoptic_cache.train.encoding import Encoding, make_encoding, nearest_centroids
from panoptic_cache.train.model import HALF, PanopticModel, check_size
from panoptic_cache.train.restore import load_model

Pixels = NDArray[np.uint8]
"""A photo: (H, W, 3) uint8 RGB."""
Photo = Path | str | Image.Image | NDArray[Any]
"""What a photo may be given as, see `Predictor.__call__`."""
TOGETHER = 8
"""Tiles that the network takes at once."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The network's output for one photo, before decoding."""

    instance: Tensor  # (channels, h, w) codes, at the network's input size without padding
    semantic: Tensor  # (C, h, w) logits

    def mirrored(self, encoding: Encoding) -> Heads:
        """What the mirrored photo would give."""
        return Heads(encoding.mirrored(self.instance.flip(-1)), self.semantic.flip(-1))


class Predictor:
    """A model and everything needed to turn photos into panoptic maps.

    Args:
        checkpoint: A run's folder, one of its checkpoints, or an exported model.
        device: Such as `cuda`; by default the GPU where there is one.
        decoding: Settings of the decoder.
        flip: Average with the mirrored photo; doubles the cost of the network.
        sizes: Input sides to average over, multiples of the patch size; each costs
            (side / trained side)^2. Empty: the trained side alone.
        weights: `model` (the last ones) or `ema` (their moving average); by default the average
            where there is one.
        precision: Of the network. `bf16` is several times as fast on a GPU and changes a few
            pixels.
        tile: Side of the tiles that photos are cut into, pixels; each is one input of the network.
            By default that of training; 0 takes photos whole.
        overlap: Pixels that neighbouring tiles share at least, by default a quarter of a tile.
            Objects that are no larger are seen whole by one of them.

    Raises:
        InputError: No complete checkpoint, no such device, or a side that the patch size does not
            divide.

    Attributes:
        categories: By label.
        size: Side of the network's square input, pixels.
        model: The network, in evaluation mode.
        identity: What its predictions depend on besides the photos, as plain values.
    """

    identity: dict[str, Any]
    tile: int | None
    overlap: int
    _decoding: DecodeConfig

    def __init__(
        self,
        checkpoint: Path | str,
        device: str | None = None,
        decoding: DecodeConfig | None = None,
        *,
        flip: bool = False,
        sizes: Sequence[int] = (),
        weights: Weights | None = None,
        precision: Precision = "fp32",
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        folder = find_checkpoint(Path(checkpoint))  # once: a running training adds newer ones
        model, state = load_model(folder, find_device(device), weights=weights)
        for side in sizes:
            check_size(side, side, model.patch_size, where="--sizes")
        self._set_up(model, state, precision, decoding, flip, sizes, tile, overlap)
        # complete.json holds the SHA-256 of every file of the checkpoint.
        complete = (folder / "complete.json").read_bytes()
        self.identity = {
            "checkpoint": hashlib.sha256(complete).hexdigest(),
            "decoding": asdict(self._decoding),
            "flip": flip,
            "sizes": list(sizes),
            "weights": weights or "default",
            "precision": precision,
        }
        if self.tile is not None:
            check_tile(self.tile, self.overlap, where="--tile and --overlap")
            self.identity |= {"tile": self.tile, "overlap": self.overlap}

    @classmethod
    def of_model(cls, model: PanopticModel, state: TrainState) -> Predictor:
        """Predicts with a model in training, on its device and in its precision.

        The model must be in evaluation mode.
        """
        predictor = cls.__new__(cls)
        predictor._set_up(model, state, state.config.precision)
        return predictor

    def _set_up(  # noqa: PLR0917
        self,
        model: PanopticModel,
        state: TrainState,
        precision: Precision,
        decoding: DecodeConfig | None = None,
        flip: bool = False,
        sizes: Sequence[int] = (),
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        config = state.config
        self.model, self.state, self._device = model, state, model.mean.device
        self.identity = {"step": state.step}
        self.size, self._fit, self._precision = config.data.size, config.data.fit, precision
        self._decoding, self._flip = decoding or DecodeConfig(), flip
        self._sizes = tuple(sizes) or (self.size,)
        self.tile = (config.data.tile if tile is None else tile) or None
        self.overlap = (self.tile or 0) // 4 if overlap is None else overlap
        self.categories: tuple[Category, ...] = state.categories
        self.encoding: Encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
        self._isthing = torch.tensor([category.isthing for category in self.categories])

    def __call__(self, photos: Sequence[Photo]) -> list[PanopticMap]:
        """Panoptic maps of a list of photos, at their own sizes.

        Args:
            photos: Paths, pictures of Pillow's, or arrays: (H, W, 3) uint8 RGB; gray and RGBA are
                converted, and so are floats in [0, 1] and 16 bits. Only paths are turned as their
                EXIF tag says.

        Raises:
            InputError: One is no photo, or the network returns NaN.
        """
        pixels = as_photos(photos)
        if self.tile is not None:
            return [self.stitch(photo, self.tiles(photo)) for photo in pixels]
        return self.decode(self.heads(pixels), [(len(p), p.shape[1]) for p in pixels])

    def tiles(self, photo: Pixels) -> Iterator[tuple[Window, Heads]]:
        """The tiles of one photo, and what the network says of each."""
        assert self.tile is not None
        places = [*windows((len(photo), photo.shape[1]), self.tile, self.overlap)]
        for start in range(0, len(places), TOGETHER):
            some = places[start : start + TOGETHER]
            # Filled up: a network rounds differently in a smaller batch.
            filled = some + some[:1] * (TOGETHER - len(some))
            yield from zip(some, self.heads([photo[one.place] for one in filled]), strict=False)

    def stitch(self, photo: Pixels, tiles: Iterable[tuple[Window, Heads]]) -> PanopticMap:
        """Decodes the tiles of a photo one by one and merges their maps."""
        config = replace(self._decoding, min_stuff_area=0)
        parts = ((one, self.decode([heads], [one.shape], config)[0]) for one, heads in tiles)
        return stitch(
            (len(photo), photo.shape[1]), parts, min_stuff_area=self._decoding.min_stuff_area
        )

    @torch.inference_mode()
    def heads(self, photos: Sequence[Photo]) -> list[Heads]:
        """Runs the network on one batch of photos of any sizes, once for each view.

        With tiles, photos must be no larger than these.
        """
        if not (photos := as_photos(photos)):
            return []
        views = [self._run(photos, side) for side in self._sizes]
        if self._flip:
            turned = [np.ascontiguousarray(photo[:, ::-1]) for photo in photos]
            for side in self._sizes:
                run = self._run(turned, side)
                views.append([heads.mirrored(self.encoding) for heads in run])
        return [average(of_one) for of_one in zip(*views, strict=True)]

    def _run(self, photos: Sequence[Pixels], side: int) -> list[Heads]:
        """Heads of photos that are fitted into (side, side); the padding is cut off again."""
        # As in training, but never cropped.
        fit: Fit = "squash" if self._fit == "squash" else "longest"
        batch = np.zeros((len(photos), side, side, 3), np.uint8)
        spans: list[tuple[slice, slice]] = []
        for canvas, photo in zip(batch, photos, strict=True):
            height, width = fitted_size(len(photo), photo.shape[1], side, fit, tile=self.tile or 0)
            top, left = (side - height) // 2, (side - width) // 2
            span = slice(top, top + height), slice(left, left + width)
            canvas[span] = resize_photo(photo, (height, width))
            spans.append(span)
        inputs = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)  # (B, 3, S, S)
        half = HALF.get(self._precision)
        with torch.autocast(self._device.type, half or torch.bfloat16, enabled=half is not None):
            prediction = self.model(inputs, "both")
        prediction = prediction.resized((side, side))
        return [
            Heads(instance[:, *span], semantic[:, *span])
            for instance, semantic, span in zip(
                prediction.instance, prediction.semantic, spans, strict=True
            )
        ]

    def wait(self) -> None:
        """Waits for the device, so that the network's time can be told from the decoder's."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def cost(self) -> float:
        """Pixels that go through the network, as a multiple of one trained-size input."""
        views = 2 if self._flip else 1
        return views * sum(side**2 for side in self._sizes) / self.size**2

    def decode(
        self,
        heads: Sequence[Heads],
        sizes: Sequence[tuple[int, int]],
        config: DecodeConfig | None = None,
    ) -> list[PanopticMap]:
        """Panoptic maps at sizes (height, width); see `decoder.decode`."""
        return decode(
            [one.instance for one in heads],
            [one.semantic for one in heads],
            encoding=self.encoding,
            isthing=self._isthing,
            sizes=sizes,
            config=config or self._decoding,
        )

    def head_pictures(self, photo: Pixels) -> tuple[Picture, Picture]:
        """The instance head as colours of centroids, and the semantic head's best categories.

        Both uint8, as in Figure 8 of the paper: (h, w, 3) of the network's input, or with tiles
        (H, W, 3) of the photo.
        """

        def read(heads: Heads) -> NDArray[np.float32]:  # (3, h, w) of u, v and label
            uv = nearest_centroids(heads.instance, self.encoding, self._decoding.cells)
            return np.concatenate([uv, heads.semantic.argmax(0)[None].float().cpu().numpy()])

        if self.tile is None:
            values = read(self.heads([photo])[0])
        else:
            size = len(photo), photo.shape[1]
            values = paste(size, ((one, read(heads)) for one, heads in self.tiles(photo)))
        isthing = [category.isthing for category in self.categories]
        return centroid_colours(values[:2]), semantic_colours(values[2].astype(np.int64), isthing)


def as_photos(photos: Iterable[Photo]) -> list[Pixels]:
    """(H, W, 3) uint8 RGB of what a caller may give; InputError says which is no photo."""
    if isinstance(photos, str | Path | Image.Image) or getattr(photos, "ndim", 4) != 4:
        raise InputError("a single photo", remedy="give a list: predictor([photo])")
    several = [*photos]
    return [
        read_photo(photo)
        if isinstance(photo, str | Path)
        else as_pixels(photo, f"photo {number} of {len(several)}")
        for number, photo in enumerate(several, start=1)
    ]


def average(views: Sequence[Heads]) -> Heads:
    """Mean codes, and logarithms of mean probabilities, over views of one photo.

    All are turned the same way; the size is that of the largest. A single view stays as it is.
    """
    if len(views) == 1:
        return views[0]
    size = max((view.instance.shape[-2:] for view in views), key=lambda each: each.numel())

    def mean(maps: Sequence[Tensor]) -> Tensor:
        resized = [F.interpolate(one[None], size, mode="bilinear")[0] for one in maps]
        return torch.stack(resized).mean(0)

    chance = mean([view.semantic.softmax(0) for view in views])
    # A probability of zero would become -inf.
    logits = chance.clamp_min(torch.finfo(torch.float32).tiny).log()
    return Heads(mean([view.instance for view in views]), logits)


def find_device(name: str | None = None) -> torch.device:
    """The device of this name; by default the GPU where there is one.

    InputError where this machine, or this build of torch, has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    # An unknown name, a torch without CUDA, a device number that is too high.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"cannot be used: {str(error).partition('. ')[0].splitlines()[0]}",
            where=f"device {name}",
            remedy="use cpu, or leave --device out",
            code="device",
        ) from None
    return device
