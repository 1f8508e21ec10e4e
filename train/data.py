"""Shards -> batches: who reads which sample when, exact augmentation, collation.

A batch ships indices, not maps: the photo, the segment index map, the EDS code and the void mask as
bytes, and one table row a segment. Codes, labels and weights are gathers on the device.

The order is stateless. Position p of the whole run belongs to epoch p // N and is sample
permutation(epoch)[p % N]; optimizer step s takes positions [s B, (s + 1) B), rank r of them every
world-th. So each sample comes exactly once an epoch for any number of ranks and loader processes,
every batch is full, and resuming is starting at another step.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar, cast

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.errors import InputError
from pipeline.manifest import ShardIndex, read_index
from pipeline.sample import Sample, encode_distance
from pipeline.shards import ShardReader
from pipeline.storage import Storage
from pipeline.targets import IndexMap, boundary, edge_distance, geometry, resize_index
from train.config import DataConfig
from train.signals import stop_with_parent_only

log = logging.getLogger(__name__)

PADDING = 3
"""Void mask of pixels outside the picture; the cache itself holds 0, 1 and 2."""

Scalar = TypeVar("Scalar", bound=np.generic)
Place = tuple[int, int]
"""(epoch, position in the cache): all that augmentation depends on besides the seed."""


@dataclass(frozen=True)
class Batch:
    """B samples of side S, on any device.

    Row 0 of the tables stands for unlabelled pixels, so that the index map gathers directly.

    Attributes:
        keys: B sample keys.
        photo: (B, 3, S, S) uint8 RGB.
        index: (B, S, S) uint8 or int32, rows of the tables.
        eds: (B, S, S) uint8, see `pipeline.sample`.
        void: (B, S, S) uint8, 0 labelled, 1 unlabelled, 2 crowd, 3 padding.
        eds_scale: (B,) float32, pixels of S for one pixel that `eds` counts.
        colour: (B, 3) float32 factors of brightness, contrast and saturation.
        centroid: (B, R, 2) float32, (u, v) in [-1, 1].
        instance: (B, R) bool, the row is a non-crowd thing with pixels.
        label: (B, R) int64, category, -1 for unlabelled and for rows of no segment.
    """

    keys: tuple[str, ...]
    photo: Tensor
    index: Tensor
    eds: Tensor
    void: Tensor
    eds_scale: Tensor
    colour: Tensor
    centroid: Tensor
    instance: Tensor
    label: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies overlap with computation where memory is pinned."""
        return Batch(
            self.keys,
            *(getattr(self, name).to(device, non_blocking=True) for name in _TENSORS),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return Batch(self.keys, *(getattr(self, name).pin_memory() for name in _TENSORS))


_TENSORS = tuple(field.name for field in fields(Batch) if field.name != "keys")


@dataclass(frozen=True, slots=True)
class Item:
    """One augmented sample, see `Batch` for the fields (without the leading axis)."""

    key: str
    photo: NDArray[np.uint8]
    index: IndexMap
    eds: NDArray[np.uint8]
    void: NDArray[np.uint8]
    eds_scale: float
    colour: NDArray[np.float32]
    centroid: NDArray[np.float32]
    instance: NDArray[np.bool_]
    label: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is drawn for one sample.

    Attributes:
        flip: Mirror left and right.
        scale: Isotropic factor on top of the fit.
        place: (x, y) in [0, 1]: where the crop or the padding goes.
        colour: Factors of brightness, contrast and saturation.
    """

    flip: bool = False
    scale: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)


def draw_augmentation(config: DataConfig, seed: int, place: Place) -> Augmentation:
    """The augmentation of a sample in an epoch: a pure function of (seed, epoch, position)."""
    if not config.augment:
        return Augmentation()
    random = np.random.default_rng([seed, *place])
    low, high = np.log(config.scale)
    flip = bool(random.random() < 0.5) and config.flip
    scale = float(np.exp(random.uniform(low, high)))
    x, y = random.random(2).tolist()
    jitter = random.uniform(1 - config.colour, 1 + config.colour, 3).tolist()
    return Augmentation(flip, scale, (x, y), (jitter[0], jitter[1], jitter[2]))


def make_item(sample: Sample, config: DataConfig, augmentation: Augmentation) -> Item:
    """Fits a cached sample to the network's input, with targets that stay exact.

    Centroids are computed anew from what is visible. Cached distances survive isotropic scaling,
    flips and crops; a fit that changes the aspect ratio computes them anew.

    Raises:
        InputError: The photo is damaged.
    """
    side = config.size
    height, width = sample.index.shape
    new_height, new_width = (
        max(1, round(length * augmentation.scale))
        for length in fitted_size(height, width, side, config.fit)
    )
    index = resize_index(sample.index, (new_height, new_width))
    photo = decode_photo(sample, (new_height, new_width))
    if config.fit == "squash" and height != width:
        eds, eds_scale = encode_distance(edge_distance(boundary(index))), 1.0
    else:
        eds, eds_scale = resize_nearest(sample.eds, index.shape), new_height / height
    void = resize_nearest(sample.void, index.shape)

    window = place_window(new_height, new_width, side, augmentation.place)
    index, eds = window.cut(index, 0), window.cut(eds, 255)
    void, photo = window.cut(void, PADDING), window.cut(photo, 0)
    if augmentation.flip:
        index, eds, void, photo = (x[:, ::-1] for x in (index, eds, void, photo))
    index = np.ascontiguousarray(index)

    found = geometry(index, len(sample.segments))
    things = np.array([s.isthing and not s.iscrowd for s in sample.segments], np.bool_)
    return Item(
        key=sample.key,
        photo=np.ascontiguousarray(photo.transpose(2, 0, 1)),
        index=index,
        eds=np.ascontiguousarray(eds),
        void=np.ascontiguousarray(void),
        eds_scale=eds_scale,
        colour=np.array(augmentation.colour, np.float32),
        centroid=np.concatenate([np.zeros((1, 2)), np.nan_to_num(found.centroid)]).astype(
            np.float32
        ),
        instance=np.concatenate([[False], things & (found.area > 0)]),
        label=np.array([-1, *(segment.label for segment in sample.segments)], np.int64),
    )


def fitted_size(height: int, width: int, side: int, fit: str) -> tuple[float, float]:
    """(height, width) after the fit, before scale jitter; see `DataConfig.fit`."""
    if fit == "squash":
        return side, side
    scale = side / (max(height, width) if fit == "longest" else min(height, width))
    return height * scale, width * scale


def decode_photo(sample: Sample, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The photo as (H, W, 3) uint8 RGB of a size; InputError where it is damaged."""
    height, width = size
    try:
        # The decoder may skip frequencies that shrinking would throw away.
        photo = simplejpeg.decode_jpeg(sample.photo, "RGB", min_height=height, min_width=width)
    except ValueError as error:
        raise InputError(
            f"photo damaged: {error}", where=f"{sample.key}.jpg", remedy="run panoptic verify"
        ) from None
    if photo.shape[:2] == size:
        return np.asarray(photo)
    smaller = height < photo.shape[0]
    mode = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(photo, (width, height), interpolation=mode))


def resize_nearest(values: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Nearest-neighbour resize to (height, width), the same sampling as the index map's."""
    return resize_index(values, (size[0], size[1])).astype(np.uint8, copy=False)


@dataclass(frozen=True, slots=True)
class Window:
    """A square of `side` laid over a picture; parts may lie outside."""

    top: int
    left: int
    side: int

    def cut(self, values: NDArray[Scalar], fill: int) -> NDArray[Scalar]:
        """The window's content (side, side, ...), `fill` outside the picture."""
        height, width = values.shape[:2]
        if (self.top, self.left, height, width) == (0, 0, self.side, self.side):
            return values
        result = np.full((self.side, self.side, *values.shape[2:]), fill, values.dtype)
        top, left = max(self.top, 0), max(self.left, 0)
        part = values[top : self.top + self.side, left : self.left + self.side]
        down, right = top - self.top, left - self.left
        result[down : down + part.shape[0], right : right + part.shape[1]] = part
        return result


def place_window(height: int, width: int, side: int, place: tuple[float, float]) -> Window:
    """Where the crop begins: a part `place` of the room that is left, negative for padding."""
    return Window(round((height - side) * place[1]), round((width - side) * place[0]), side)


def collate(items: Sequence[Item]) -> Batch:
    """Stacks items; tables are padded with rows of no segment."""
    rows = max(len(item.label) for item in items)
    index = np.stack([item.index for item in items])

    def table(name: str, fill: float) -> Tensor:
        values = [getattr(item, name) for item in items]
        result = np.full((len(items), rows, *values[0].shape[1:]), fill, values[0].dtype)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value
        return torch.from_numpy(result)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(item, name) for item in items]))

    return Batch(
        keys=tuple(item.key for item in items),
        photo=stack("photo"),
        index=torch.from_numpy(index if index.dtype == np.uint8 else index.astype(np.int32)),
        eds=stack("eds"),
        void=stack("void"),
        eds_scale=torch.tensor([item.eds_scale for item in items]),
        colour=stack("colour"),
        centroid=table("centroid", 0.0),
        instance=table("instance", 0),
        label=table("label", -1),
    )


class CachedItems(Dataset[Item]):
    """Items of a local cache by (epoch, position)."""

    def __init__(self, reader: ShardReader, config: DataConfig, seed: int) -> None:
        self._reader, self._config, self._seed = reader, config, seed

    def __getitem__(self, place: Place) -> Item:
        sample = self._reader.sample(place[1])
        return make_item(sample, self._config, draw_augmentation(self._config, self._seed, place))


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order of an epoch, the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def step_places(seed: int, samples: int, batch: int, step: int) -> list[Place]:
    """The `batch` samples of an optimizer step over all ranks; a step may span two epochs."""
    places = (divmod(p, samples) for p in range(step * batch, (step + 1) * batch))
    return [(epoch, int(permutation(seed, epoch, samples)[at])) for epoch, at in places]


class MicroBatches(Sampler[list[Place]]):
    """The micro-batches of one rank, in order, from a step on."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        samples: int,
        steps: range,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._config, self._seed, self._samples = config, seed, samples
        self._steps, self._rank, self._world = steps, rank, world

    def __len__(self) -> int:
        return len(self._steps) * accumulation(self._config, self._world)

    def __iter__(self) -> Iterator[list[Place]]:
        size = self._config.micro_batch
        for step in self._steps:
            places = step_places(self._seed, self._samples, self._config.batch, step)
            mine = places[self._rank :: self._world]
            yield from (mine[start : start + size] for start in range(0, len(mine), size))


def accumulation(config: DataConfig, world: int) -> int:
    """Micro-batches an optimizer step on each rank.

    Raises:
        InputError: The batch does not divide evenly.
    """
    count, rest = divmod(config.batch, config.micro_batch * world)
    if rest:
        raise InputError(
            f"a batch of {config.batch} does not divide into micro-batches of"
            f" {config.micro_batch} on {world} ranks",
            where="data.batch, data.micro_batch",
            remedy="choose sizes that do",
        )
    return count


def jitter_colour(photo: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation, on the device.

    Args:
        photo: (B, 3, S, S) uint8 RGB.
        factors: (B, 3) float32, 1 = unchanged.

    Returns:
        (B, 3, S, S) float32 in [0, 1].
    """
    brightness, contrast, saturation = factors.T[..., None, None, None]  # (B, 1, 1, 1) each
    scaled = photo.float() * (brightness / 255)
    mean = scaled.mean((1, 2, 3), keepdim=True)
    scaled = mean + (scaled - mean) * contrast
    grey = scaled.mean(1, keepdim=True)
    jittered: Tensor = grey + (scaled - grey) * saturation
    return jittered.clamp(0, 1)


def open_index(config: DataConfig) -> ShardIndex:
    """The training cache's index.

    Raises:
        InputError: None is named, it is not finished, or it was rendered too small.
    """
    if not config.cache:
        raise InputError("no cache is named", where="data.cache", remedy="--set data.cache=DIR")
    index = read_index(Storage(config.cache))
    if index.samples == 0:
        raise InputError("the cache is empty", where=config.cache)
    check_rendered_size(config, index.settings)
    return index


def check_rendered_size(config: DataConfig, settings: Mapping[str, Any]) -> None:
    """Raises InputError where training would enlarge a cache that was rendered smaller.

    Args:
        config: Of the training.
        settings: That the cache was rendered with.
    """
    fit, size = settings.get("fit"), settings.get("size")
    if size is not None and size < config.size and not config.upscale:
        raise InputError(
            f"rendered at {size} px, trained at {config.size} px",
            where=config.cache,
            remedy=f"preprocess with --size {config.size}, lower data.size, or accept the blur"
            " with --set data.upscale=true",
            code="cache-size",
        )
    if fit == "squash" and config.fit != "squash":
        log.warning("%s: squashed already; data.fit = %s changes nothing", config.cache, config.fit)


def repeats(config: DataConfig, samples: int, step: int) -> bool:
    """Whether a sample may come twice in a step: at the end of an epoch, or from the stream."""
    return config.reader == "stream" or step * config.batch % samples + config.batch > samples


def indexed_loader(
    reader: ShardReader,
    config: DataConfig,
    *,
    seed: int,
    steps: range,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Micro-batches of the given optimizer steps for one rank.

    It must not go through `Accelerator.prepare`: it is cut into ranks already.
    """
    sampler = MicroBatches(
        config, seed=seed, samples=len(reader), steps=steps, rank=rank, world=world
    )
    return DataLoader(
        cast("Dataset[Batch]", CachedItems(reader, config, seed)),  # collated into batches
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.workers,
        pin_memory=pin,
        prefetch_factor=4 if config.workers else None,
        persistent_workers=False,
        # Else starting draws from the global generator, and a resumed run differs.
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=prepare_worker if config.workers else None,
    )


def iterate(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """The loader's batches; close it, so that its processes end.

    An InputError of a loader process reads like one of this process.
    """
    try:
        yield from loader
    except InputError as error:
        # Its message has become a traceback, whose last line is the message.
        line = str(error).splitlines()[-1]
        raise InputError(line.removeprefix("pipeline.errors.InputError: ")) from None


def prepare_worker(_: int) -> None:
    """One thread a loader process: the processes are the parallelism.

    And it lives as long as the training wants it to, whatever signals the whole job gets.
    """
    stop_with_parent_only()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
