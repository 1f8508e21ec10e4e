"""A trained model on pictures: photos -> heads -> panoptic maps -> COCO panoptic PNG and JSON.

Three lines do it from Python:

    from panoptic_cache.evaluate.predict import Predictor, read_picture
    predictor = Predictor("runs/train")
    result = predictor([read_picture("photo.jpg")])[0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode
from panoptic_cache.evaluate.photos import read_picture
from panoptic_cache.evaluate.views import Heads, average, mirrored, network_cost
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures.colours import Picture, centroid_colours, semantic_colours
from panoptic_cache.pipeline.render.photo import resize_photo
from panoptic_cache.train.augment import fitted_size
from panoptic_cache.train.config import Precision
from panoptic_cache.train.encoding import Encoding, grid_cells, make_encoding, nearest_centroids
from panoptic_cache.train.model import PanopticModel, check_size
from panoptic_cache.train.restore import TrainState, Weights, find_checkpoint, load_model

__all__ = ["Predictor", "read_picture"]


class Predictor:
    """A model with everything that turns pictures into panoptic maps.

    Args:
        checkpoint: A run's folder or one of its checkpoints.
        device: Such as `cuda`; by default the GPU where there is one.
        decoding: Settings of the decoder.
        flip: Average with the mirrored picture: 2x the network.
        sizes: Average over these sides of the input, multiples of the patch size; each costs the
            network (side / trained side)^2. The trained side alone where empty.
        weights: `model`, the last ones, or `ema`, their moving average; by default the average
            where there is one.
        precision: Of the network; `bf16` is several times as fast on a GPU, and changes a few
            pixels.

    Raises:
        InputError: No complete checkpoint, no such device, or a side that patches do not tile.

    Attributes:
        categories: By label.
        size: Side of the network's square input, pixels.
        model: The network, in evaluation mode.
        cost: How often the pixels of the trained size go through the network.
        identity: What its predictions depend on beside the pictures; plain values.
    """

    identity: dict[str, Any]

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
    ) -> None:
        chosen = find_device(device)
        folder = find_checkpoint(Path(checkpoint))  # once: a running training adds newer ones
        model, state = load_model(folder, chosen, weights=weights)
        self._set_up(model, state, decoding, flip=flip, sizes=sizes, precision=precision)
        self.identity = {
            "checkpoint": checkpoint_digest(folder),
            "decoding": asdict(self._decoding),
            "flip": flip,
            "sizes": list(sizes),
            "weights": weights or "default",
            "precision": precision,
        }

    @classmethod
    def of_model(cls, model: PanopticModel, state: TrainState) -> Predictor:
        """Predicts with a model that is in training, where and in the precision that it is.

        It must be in evaluation mode.
        """
        predictor, precision = cls.__new__(cls), state.config.precision
        predictor._set_up(model, state, None, flip=False, sizes=(), precision=precision)
        return predictor

    def _set_up(
        self,
        model: PanopticModel,
        state: TrainState,
        decoding: DecodeConfig | None,
        *,
        flip: bool,
        sizes: Sequence[int],
        precision: Precision,
    ) -> None:
        self.model, self.state, self._device = model, state, model.mean.device
        config = self.state.config
        self._decoding = decoding or DecodeConfig(cells=grid_cells(config.data.size))
        self.identity = {"step": state.step}
        self._fit, self._precision = config.data.fit, precision
        self.size = config.data.size
        self._flip, self._sizes = flip, tuple(sizes) or (self.size,)
        for side in sizes:
            check_size(side, side, self.model.patch_size, where="--sizes")
        self.cost = network_cost(self.size, self._sizes, flip=flip)
        self.categories: tuple[Category, ...] = self.state.categories
        self.encoding: Encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
        self._isthing = torch.tensor([category.isthing for category in self.categories])

    def __call__(self, photos: Sequence[Picture]) -> list[PanopticMap]:
        """Panoptic maps of (H, W, 3) uint8 RGB photos, at their own sizes."""
        return self.decode(self.heads(photos), [(len(p), p.shape[1]) for p in photos])

    @torch.inference_mode()
    def heads(self, photos: Sequence[Picture]) -> list[Heads]:
        """Runs the network on one batch of photos of any sizes, once for each view."""
        views = [self._run(photos, side) for side in self._sizes]
        if self._flip:
            turned = [np.ascontiguousarray(photo[:, ::-1]) for photo in photos]
            for side in self._sizes:
                run = self._run(turned, side)
                views.append([mirrored(heads, self.encoding) for heads in run])
        return [average(of_one) for of_one in zip(*views, strict=True)]

    def _run(self, photos: Sequence[Picture], side: int) -> list[Heads]:
        batch = np.zeros((len(photos), side, side, 3), np.uint8)
        spans: list[tuple[slice, slice]] = []
        for canvas, photo in zip(batch, photos, strict=True):
            height, width = self._fitted(photo, side)
            top, left = (side - height) // 2, (side - width) // 2
            span = slice(top, top + height), slice(left, left + width)
            canvas[span] = resize_photo(photo, (height, width))
            spans.append(span)
        pictures = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            prediction = self.model(pictures, "both")
        prediction = prediction.resized((side, side))
        return [
            Heads(instance[:, *span], semantic[:, *span])
            for instance, semantic, span in zip(
                prediction.instance, prediction.semantic, spans, strict=True
            )
        ]

    def wait(self) -> None:
        """Until the device has done what it was given: to tell the time of the network."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def cells(self) -> int:
        """Cells an axis of the decoding grid."""
        return self._decoding.cells

    def _fitted(self, photo: Picture, side: int) -> tuple[int, int]:
        """Size on the network's canvas: as in training, but never cropped."""
        fit = "squash" if self._fit == "squash" else "longest"
        height, width = fitted_size(photo.shape[0], photo.shape[1], side, fit)
        return max(1, round(height)), max(1, round(width))

    def decode(self, heads: Sequence[Heads], sizes: Sequence[tuple[int, int]]) -> list[PanopticMap]:
        """The panoptic maps of pictures of (height, width); see `decoder.decode`."""
        return decode(
            [one.instance for one in heads],
            [one.semantic for one in heads],
            encoding=self.encoding,
            isthing=self._isthing,
            sizes=sizes,
            config=self._decoding,
        )

    def head_pictures(self, heads: Heads) -> tuple[Picture, Picture]:
        """The instance head as centroid colours and the semantic head's categories (Figure 8)."""
        uv = nearest_centroids(heads.instance, self.encoding, self._decoding.cells)
        labels = heads.semantic.argmax(0).cpu().numpy()
        isthing = [category.isthing for category in self.categories]
        return centroid_colours(uv), semantic_colours(labels, isthing)


def find_device(name: str | None = None) -> torch.device:
    """The device of this name; by default the GPU where there is one.

    Raises:
        InputError: This machine, or this build of torch, has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    # A name of no device, a torch without CUDA, a number that is too high.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"cannot be used: {str(error).partition('. ')[0].splitlines()[0]}",
            where=f"device {name}",
            remedy="use cpu, or leave --device out",
            code="device",
        ) from None
    return device


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of `complete.json`, which holds those of all files of a checkpoint."""
    return hashlib.sha256((folder / "complete.json").read_bytes()).hexdigest()
