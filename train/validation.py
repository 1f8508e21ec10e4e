"""Looks at a model while it trains: losses and measures of held-out samples, and a picture."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures import (
    Picture,
    Tile,
    centroid_colours,
    semantic_colours,
    sheet,
)
from panoptic_cache.train.augment import Augmentation, make_item
from panoptic_cache.train.caches import check_rendered_size
from panoptic_cache.train.checkpoint import TrainState
from panoptic_cache.train.config import LossConfig, TrainConfig
from panoptic_cache.train.data import Batch, collate
from panoptic_cache.train.encoding import (
    Encoding,
    grid_cells,
    make_encoding,
    nearest_cell,
    nearest_cells,
    nearest_centroids,
)
from panoptic_cache.train.losses import (
    Distance,
    gather_rows,
    instance_loss,
    instance_weight,
    semantic_loss,
)
from panoptic_cache.train.model import PanopticModel

EVERYWHERE = LossConfig(eds=False)
"""Gives every pixel of the instance task the weight 1."""
SHOWN = 4
"""Samples on a picture."""
CAPTIONED = 160
"""Least side of a tile of it, pixels: its caption fits."""


Metric = Callable[[PanopticModel, TrainState, Iterable[Sample]], Mapping[str, float]]
"""What `validation.metric` names: measures a model, in evaluation mode, on held-out samples.

It is called on the main rank only. No autocast is on: it chooses the precision of its network runs
itself. The other ranks wait, at most for the timeout of the process group: it should take minutes.
"""


@dataclass(frozen=True)
class HeldOut:
    """A slice of held-out samples, opened and checked."""

    reader: ShardReader  # Reads the cache
    positions: tuple[int, ...]  # Of the slice's samples in the cache, the same each time
    metric: Metric | None  # A further measure, or None

    def samples(self, positions: Iterable[int]) -> Iterator[Sample]:
        """Some samples of the cache, read one by one."""
        return (self.reader.sample(position) for position in positions)

    def batches(self, config: TrainConfig, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one rank's part, without augmentation."""
        mine, size = self.positions[rank::world], config.data.micro_batch
        for start in range(0, len(mine), size):
            samples = self.samples(mine[start : start + size])
            yield collate([make_item(sample, config.data, Augmentation()) for sample in samples])


def open_held_out(
    config: TrainConfig, categories: tuple[Category, ...], *, trust: bool = False
) -> HeldOut | None:
    """The held-out samples that a configuration names; None if it names none.

    Raises InputError where their cache is remote, empty or of other categories than the training
    cache, or where `find_metric` does.
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
    return HeldOut(reader, positions, find_metric(name, trust=trust) if name else None)


def find_metric(name: str, *, trust: bool = False) -> Metric:
    """The function of a `module:function`; InputError if there is none.

    Only `trust` imports modules outside this package: importing runs them, and a configuration may
    come from somebody else.
    """
    where = f"validation.metric = {name}"
    module, _, function = name.partition(":")
    if module.startswith("evaluate."):  # as version 0.1 wrote it
        module = f"panoptic_cache.{module}"
    if not trust and not module.startswith("panoptic_cache."):
        raise InputError(
            f"{module} is no module of this program, and importing runs it",
            where=where,
            remedy="add --trust-config if it is yours",
        )
    try:
        return cast("Metric", getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"no such function: {error}",
            where=where,
            remedy="panoptic_cache.evaluate.held_out:panoptic_quality is one",
        ) from None


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: PanopticModel,
    held_out: HeldOut,
    state: TrainState,
    distance: Distance,
) -> dict[str, float]:
    """Measures a model on held-out samples, each rank its part; call on every rank.

    The losses; `semantic_accuracy`, the fraction of labelled pixels with the right category;
    `code_accuracy`, of instance pixels whose code is nearest to their centroid's cell or one of its
    eight neighbours; `void_accuracy`, of the other pixels whose code is nearest to void; on the
    main rank also what the metric returns. The model, which is not wrapped, is left in evaluation
    mode.
    """
    config, model = state.config, model.eval()
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
    cells = grid_cells(config.data.size)
    rank, world = accelerator.process_index, accelerator.num_processes
    # Where there is nobody to add up with, on the processor: MPS has no float64.
    where = accelerator.device if world > 1 else torch.device("cpu")
    sums = torch.zeros(9, dtype=torch.float64, device=where)
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
        found_here = torch.stack([here.eds_scale.new_tensor(images), *losses, *hits])
        sums += found_here.to(where).double()
    images, instance, semantic, *pairs = accelerator.reduce(sums, "sum").tolist()
    right, counted = pairs[::2], pairs[1::2]
    names = ("semantic_accuracy", "code_accuracy", "void_accuracy")
    values = {"instance_loss": instance / images, "semantic_loss": semantic / images}
    values |= {n: r / max(1.0, c) for n, r, c in zip(names, right, counted, strict=True)}
    if held_out.metric is not None and accelerator.is_main_process:
        values |= held_out.metric(model, state, held_out.samples(held_out.positions))
    return values


def label_hits(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Labelled pixels with the right category, and all labelled pixels; scalars."""
    label = batch.label.gather(1, batch.segment_map.flatten(1).long()).view(batch.segment_map.shape)
    labelled = label >= 0
    return ((logits.argmax(1) == label) & labelled).sum(), labelled.sum()


def code_hits(
    code: Tensor, batch: Batch, encoding: Encoding, cells: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts pixels whose code points at their own instance, and others that point at none.

    Of the code, (B, channels, S, S), on a grid of `cells` per axis; crowd and padding do not count.
    Four scalars: instance pixels within one cell of their centroid's cell, all instance pixels,
    pixels of no instance whose code is nearest to void, and all pixels of no instance.
    """
    truth = gather_rows(nearest_cell(batch.centroid, cells), batch.segment_map)  # (B, 2, S, S)
    member = gather_rows(batch.instance[..., None], batch.segment_map)[:, 0]  # (B, S, S)
    counted = instance_weight(batch, EVERYWHERE) > 0
    near, void = torch.zeros_like(member), torch.zeros_like(member)
    for row, one in enumerate(code):  # one image at a time: memory grows with pixels times cells
        cell, empty = nearest_cells(one.flatten(1), encoding, cells)
        apart = (torch.unflatten(cell, 1, one.shape[1:]) - truth[row]).abs().amax(0)
        void[row] = empty.view(one.shape[1:])
        near[row] = (apart <= 1) & ~void[row]
    things, rest = member & counted, ~member & counted
    return (near & things).sum(), things.sum(), (void & rest).sum(), rest.sum()


@torch.no_grad()
def draw_heads(
    model: PanopticModel, batch: Batch, encoding: Encoding, categories: Sequence[Category]
) -> Picture:
    """Draws both heads beside their targets, one row for each of the first samples of a batch.

    A code is shown before any decoding, in the colour of the centroid that it is nearest to. The
    model, which is not wrapped, is left in evaluation mode.
    """
    isthing = [category.isthing for category in categories]
    found = model.eval()(batch.photo[:SHOWN], "both").resized(batch.segment_map.shape[1:])
    size = batch.segment_map.shape[1]
    scale = math.ceil(CAPTIONED / size)
    rows: list[list[Tile]] = []
    for row, code in enumerate(found.instance):
        segment_map = batch.segment_map[row].long()
        centroid = batch.centroid[row].masked_fill(~batch.instance[row, :, None], torch.nan)
        guess = nearest_centroids(code, encoding, grid_cells(size))
        true_labels, labels = batch.label[row][segment_map], found.semantic[row].argmax(0)
        tiles = {
            batch.keys[row].lstrip("0"): batch.photo[row].permute(1, 2, 0).cpu().numpy(),
            "true centroids": centroid_colours(
                centroid[segment_map].permute(2, 0, 1).cpu().numpy()
            ),
            "instance head": centroid_colours(guess),
            "true categories": semantic_colours(true_labels.cpu().numpy(), isthing),
            "semantic head": semantic_colours(labels.cpu().numpy(), isthing),
        }
        rows.append(
            [(name, tile.repeat(scale, 0).repeat(scale, 1)) for name, tile in tiles.items()]
        )
    return sheet(rows)
