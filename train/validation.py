"""A slice of held-out samples: losses, pixel accuracies, and any measure found by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.augment import Augmentation, make_item
from panoptic_cache.train.config import LossConfig, TrainConfig
from panoptic_cache.train.data import Batch, check_rendered_size, collate
from panoptic_cache.train.encoding import Encoding, grid_cells, nearest_cell, nearest_cells
from panoptic_cache.train.losses import (
    Distance,
    gather_rows,
    instance_loss,
    instance_weight,
    semantic_loss,
)
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.restore import TrainState

EVERYWHERE = LossConfig(eds=False)
"""Weights of 1 wherever the instance task counts."""


class Metric(Protocol):
    """What `validation.metric` names."""

    def __call__(
        self, model: PanopticModel, state: TrainState, samples: Iterable[Sample]
    ) -> Mapping[str, float]:
        """Measures a model, in evaluation mode, on samples; called on the main rank only.

        The precision of its network runs is its own matter: no autocast is on.
        The other ranks wait meanwhile, for at most the time-out of the process group: keep it
        to minutes.
        """
        ...


@dataclass(frozen=True)
class HeldOut:
    """The slice, opened and checked.

    Attributes:
        reader: Of the cache.
        positions: Of its samples in the cache, the same each time.
        metric: A further measure.
    """

    reader: ShardReader
    positions: tuple[int, ...]
    metric: Metric | None

    def samples(self) -> Iterator[Sample]:
        """All samples of the slice."""
        return (self.reader.sample(position) for position in self.positions)

    def batches(self, config: TrainConfig, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank's part, without augmentation."""
        mine, size = self.positions[rank::world], config.data.micro_batch
        for start in range(0, len(mine), size):
            yield collate(
                [
                    make_item(self.reader.sample(position), config.data, Augmentation())
                    for position in mine[start : start + size]
                ]
            )


def open_held_out(config: TrainConfig, categories: tuple[Category, ...]) -> HeldOut | None:
    """The slice that a configuration names, or None.

    Raises:
        InputError: Its cache is remote, empty or of other categories, or there is no such metric.
    """
    if not config.validation.every:
        return None
    cache = config.validation.cache
    local = Storage(cache).local
    if local is None:
        raise InputError(
            "validation needs a local cache", where=cache, remedy="copy it to a local disk"
        )
    reader = ShardReader(local)
    if not len(reader):
        raise InputError("the cache is empty", where=cache)
    if reader.index.categories != categories:
        raise InputError(
            "its categories differ from those of the training cache",
            where=cache,
            remedy="render both from annotations with the same categories",
        )
    check_rendered_size(config.data, reader.index.settings, cache)
    count = min(config.validation.samples, len(reader))
    positions = tuple(number * len(reader) // count for number in range(count))
    name = config.validation.metric
    return HeldOut(reader, positions, find_metric(name) if name else None)


def find_metric(name: str) -> Metric:
    """The function `module:function`; InputError where there is none."""
    module, _, function = name.partition(":")
    if module.startswith("evaluate."):  # how runs of version 0.1 name it
        module = f"panoptic_cache.{module}"
    try:
        return cast("Metric", getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"no such function: {error}",
            where=f"validation.metric = {name}",
            remedy="panoptic_cache.evaluate.held_out:panoptic_quality is one",
        ) from None


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: PanopticModel,
    held_out: HeldOut,
    state: TrainState,
    *,
    encoding: Encoding,
    distance: Distance,
) -> dict[str, float]:
    """Measures a model on the slice; call on every rank.

    Args:
        accelerator: Of the run; each rank takes its part of the samples.
        model: Not the one that Accelerate wrapped; left in evaluation mode.
        held_out: The slice.
        state: Of the run.
        encoding: Of the instance head.
        distance: Of the instance loss.

    Returns:
        `instance_loss` and `semantic_loss`; `semantic_accuracy`, the part of the labelled pixels
        with the right category; `code_accuracy`, the part of the instances' pixels whose code is
        nearest to a cell at most one away from their centroid's, an axis; `void_accuracy`, the
        part of the other pixels whose code is nearest to void; on the main rank also the metric's.
    """
    config, model = state.config, model.eval()
    cells = grid_cells(config.data.size)
    sums = torch.zeros(9, dtype=torch.float64, device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    for batch in held_out.batches(config, rank, world):
        here = batch.to(accelerator.device)
        with accelerator.autocast():  # the network alone, as in training
            found = model(here.photo, "both")
        full = found.resized(here.segment_map.shape[1:])
        images = len(here.keys)
        losses = (
            instance_loss(found.instance, here, encoding, config.loss, distance).total * images,
            semantic_loss(found.semantic, here, config.loss).total * images,
        )
        hits = (*label_hits(full.semantic, here), *code_hits(full.instance, here, encoding, cells))
        sums += torch.stack([here.eds_scale.new_tensor(images), *losses, *hits]).double()
    images, instance, semantic, *pairs = accelerator.reduce(sums, "sum").tolist()
    right, counted = pairs[::2], pairs[1::2]
    names = ("semantic_accuracy", "code_accuracy", "void_accuracy")
    values = {"instance_loss": instance / images, "semantic_loss": semantic / images}
    values |= {n: r / max(1.0, c) for n, r, c in zip(names, right, counted, strict=True)}
    if held_out.metric is not None and accelerator.is_main_process:
        values |= held_out.metric(model, state, held_out.samples())
    return values


def label_hits(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Labelled pixels with the right category, and all labelled pixels; scalars."""
    label = batch.label.gather(1, batch.segment_map.flatten(1).long()).view(batch.segment_map.shape)
    labelled = label >= 0
    return ((logits.argmax(1) == label) & labelled).sum(), labelled.sum()


def code_hits(
    code: Tensor, batch: Batch, encoding: Encoding, cells: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many pixels point at their own instance, and how many of the others at none.

    Args:
        code: (B, channels, S, S) of the instance head.
        batch: The samples; crowd and padding do not count.
        encoding: Of the code.
        cells: Of the grid, an axis.

    Returns:
        Instance pixels within one cell of their centroid's, all instance pixels, pixels of no
        instance nearest to void, all of those; scalars.
    """
    truth = gather_rows(nearest_cell(batch.centroid, cells), batch.segment_map)  # (B, 2, S, S)
    member = gather_rows(batch.instance[..., None], batch.segment_map)[:, 0]  # (B, S, S)
    counted = instance_weight(batch, EVERYWHERE) > 0
    near, void = torch.zeros_like(member), torch.zeros_like(member)
    for row, one in enumerate(code):  # an image at a time: a cost for each pixel and cell
        cell, empty = nearest_cells(one.flatten(1), encoding, cells)
        apart = (torch.unflatten(cell, 1, one.shape[1:]) - truth[row]).abs().amax(0)
        void[row] = empty.view(one.shape[1:])
        near[row] = (apart <= 1) & ~void[row]
    things, rest = member & counted, ~member & counted
    return (near & things).sum(), things.sum(), (void & rest).sum(), rest.sum()
