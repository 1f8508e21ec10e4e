"""How fast training is fed and how fast it steps, each against its floor.

`bench_load`: one training sample on one core, from the cache, online, and the photo alone.
`bench_step`: optimizer steps, of the encoder alone, on a batch in memory, and fed by the loader.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import nn

from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.sample import encode_distance
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import CocoLayout, PanopticRecord
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.render.bench import (
    BenchTable,
    Timing,
    bench_dataset,
    best_ms,
    obvious_targets,
    timing_table,
)
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.targets import compute_targets, make_segment_map, resize_segment_map
from panoptic_cache.train.augment import Augmentation, draw_augmentation, jitter_colour, make_item
from panoptic_cache.train.config import DataConfig, ModelConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.data import Batch, collate, indexed_loader
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.losses import instance_loss, semantic_loss
from panoptic_cache.train.model import PanopticModel, Task
from panoptic_cache.train.optim import parameter_groups, set_learning_rate
from panoptic_cache.train.stopping import memory_advice, smaller_steps
from panoptic_cache.train.summary import summarize_model

# Loading


def bench_load(layout: CocoLayout | None = None, images: int = 32, size: int = 420) -> BenchTable:
    """Makes training samples on one core: from the cache, online, and only the photo.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: Number of samples.
        size: Side of the network's input, and of the cache.
    """
    cv2.setNumThreads(1)
    config = DataConfig(size=size)
    with bench_dataset(layout, images) as dataset, tempfile.TemporaryDirectory() as folder:
        render(dataset, "bench", Storage(folder), RenderConfig("squash", size), workers=0)
        reader = ShardReader(Path(folder))
        count = len(reader)

        def cached() -> None:
            for position in range(count):
                augmentation = draw_augmentation(config, 0, (0, position))
                make_item(reader.sample(position), config, augmentation)

        def each(work: Callable[[PanopticRecord, int], object]) -> float:
            return best_ms(lambda: [work(record, size) for record in dataset.records], count)

        slow, fast, ours, floor = timings = (
            Timing("online, the obvious way: Pillow, scipy, a loop", each(obvious)),
            Timing("online, by our functions", each(online)),
            Timing("from the cache", best_ms(cached, count)),
            Timing("the floor: JPEG decode and resize", each(photo_only)),
        )
    return timing_table(
        f"one training sample at {size} px, {count} images on one core",
        timings,
        {
            "the cache against online, the obvious way": slow.ms / ours.ms,
            "the cache against online, by our functions": fast.ms / ours.ms,
            "the cache against the floor": ours.ms / floor.ms,
        },
    )


def obvious(record: PanopticRecord, size: int) -> None:
    """A training sample straight from COCO's files, as one would write it first."""
    photo = Image.open(record.photo).convert("RGB")
    np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))
    obvious_targets(record, size)


def online(record: PanopticRecord, size: int) -> None:
    """A training sample straight from COCO's files: the same targets, by the same functions."""
    index = make_segment_map(read_ids(record.png), [segment.id for segment in record.segments])
    iscrowd = [bool(segment.iscrowd) for segment in record.segments]
    targets = compute_targets(resize_segment_map(index, (size, size)), iscrowd)
    encode_distance(targets.distance)
    photo_only(record, size)


def photo_only(record: PanopticRecord, size: int) -> None:
    """What any training must do: decode a photo and resize it."""
    photo = simplejpeg.decode_jpeg(
        record.photo.read_bytes(), "RGB", min_height=size, min_width=size
    )
    cv2.resize(photo, (size, size), interpolation=cv2.INTER_AREA)


# Stepping

Step = Callable[[Batch, Task], object]

ROUND: tuple[Task, ...] = ("instance", "instance", "semantic")
"""The tasks of three steps as training repeats them."""

SMALL = {
    "ViT-S, 224 px": TrainConfig(
        precision="fp32",
        data=DataConfig(size=224, micro_batch=4, workers=1),
        model=ModelConfig(
            backbone="random",
            random=RandomBackbone(hidden_size=384, layers=12, heads=6, patch_size=14),
            channels=128,
        ),
    )
}
"""What a processor can step: half as wide as ViT-B, and so is its decoder."""

LARGE = {
    "ViT-B, 420 px": TrainConfig(data=DataConfig(size=420, micro_batch=32, workers=8)),
    "ViT-L, 518 px": TrainConfig(
        data=DataConfig(size=518, micro_batch=32, workers=8),
        model=ModelConfig(backbone="facebook/dinov2-large", taps=(5, 12, 18, 24)),
    ),
}
"""The smallest and the largest of the paper's models, as `configs/` has them."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One variant of a model: milliseconds an image, of the best round."""

    model: str
    variant: str
    encoder_ms: float  # the encoder alone, forward and backward
    instance_ms: float  # the whole step of the instance task
    semantic_ms: float  # the same of the semantic task
    fed_ms: float  # the whole step, tasks alternating, fed by the loader
    tflops: float  # TFLOP/s of the whole step; what is recomputed does not count
    matrix_tflops: float  # TFLOP/s of a large matrix product on this device
    peak_gib: float  # of the device's memory; 0 on a processor

    @property
    def whole_ms(self) -> float:
        """The whole step, averaged over the tasks as they alternate."""
        return (2 * self.instance_ms + self.semantic_ms) / 3


def step_table(title: str, timings: Sequence[StepTiming]) -> BenchTable:
    """A column for each variant: a line for each part of a step, then one for each ratio."""
    lines: list[tuple[str, Callable[[StepTiming], str]]] = [
        ("the encoder alone, forward and backward", lambda t: f"{t.encoder_ms:.1f}"),
        ("the whole step, instance task", lambda t: f"{t.instance_ms:.1f}"),
        ("the whole step, semantic task", lambda t: f"{t.semantic_ms:.1f}"),
        ("both as they alternate, fed by the loader", lambda t: f"{t.fed_ms:.1f}"),
        ("images/s", lambda t: f"{1e3 / t.fed_ms:.1f}"),
        ("whole step against encoder alone", lambda t: f"{t.whole_ms / t.encoder_ms:.2f}"),
        ("fed against whole step", lambda t: f"{t.fed_ms / t.whole_ms:.2f}"),
        ("TFLOP/s", lambda t: f"{t.tflops:.3g}"),
        ("part of the matrix rate", lambda t: f"{t.tflops / t.matrix_tflops:.2f}"),
        ("GiB of the device's memory", lambda t: f"{t.peak_gib:.1f}"),
    ]
    shown = lines if any(t.peak_gib for t in timings) else lines[:-1]
    ratios = [
        {"whole_to_encoder": t.whole_ms / t.encoder_ms, "fed_to_whole": t.fed_ms / t.whole_ms}
        for t in timings
    ]
    return BenchTable(
        title,
        ("ms/image", *(f"{t.model}: {t.variant}" for t in timings)),
        [(name, *map(value, timings)) for name, value in shown],
        {"title": title, "timings": [asdict(t) for t in timings], "ratios": ratios},
    )


def bench_step(
    config: TrainConfig | None = None,
    *,
    classes: int = 133,
    rounds: int = 3,
    compiled: bool | None = None,
) -> BenchTable:
    """Times training steps with and without gradient checkpointing and `torch.compile`.

    Args:
        config: The run; a step takes one micro-batch. Without one, the paper's models on a GPU, a
            small one elsewhere.
        classes: Categories of the semantic head.
        rounds: Rounds of three steps after one to warm up; the best counts.
        compiled: Try `torch.compile` too; on a GPU by default, as it takes minutes elsewhere.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    models = {"as configured": config} if config else LARGE if on_gpu else SMALL
    compilations = (False, True) if (on_gpu if compiled is None else compiled) else (False,)
    variants = [
        (name, replace(run, compile=fused, model=replace(run.model, gradient_checkpointing=again)))
        for name, run in models.items()
        for fused in compilations
        for again in (False, True)
    ]
    timings = []
    with progress("bench", len(variants), "variants") as advance:
        for name, run in variants:
            with memory_advice(smaller_steps(run)):
                timings.append(time_variant(name, run, classes, rounds, device))
            advance(1, name)
    threads = f"the processor, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if on_gpu else threads
    return step_table(f"training steps on {where}", timings)


def time_variant(
    name: str, config: TrainConfig, classes: int, rounds: int, device: torch.device
) -> StepTiming:
    """Times one variant; see `bench_step`."""
    on_gpu = device.type == "cuda"
    half = config.precision == "bf16" and on_gpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    encoder_alone, whole_step = make_steps(config, classes, device, half)
    data = replace(config.data, batch=config.data.micro_batch, cache="")
    with bench_dataset(None, 64) as dataset, tempfile.TemporaryDirectory() as folder:
        render(dataset, "bench", Storage(folder), RenderConfig("squash", data.size), workers=0)
        reader = ShardReader(Path(folder))
        items = [make_item(reader.sample(p % 64), data, Augmentation()) for p in range(data.batch)]
        still = repeat(collate(items).to(device))
        steps = range(len(ROUND) * (rounds + 1))
        loader = indexed_loader(reader, data, seed=0, steps=steps, pin=on_gpu)
        fed = (batch.to(device) for batch in loader)
        times = [  # the parts alternate, so that all see the same machine
            {
                "encoder_ms": round_ms(encoder_alone, still, ROUND, device),
                "instance_ms": round_ms(whole_step, still, ("instance",) * 2, device),
                "semantic_ms": round_ms(whole_step, still, ("semantic",), device),
                "fed_ms": round_ms(whole_step, fed, ROUND, device),
            }
            for _ in range(rounds + 1)
        ][1:]  # the first compiles, and fills the loader's queue
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0
    best = {part: min(each[part] for each in times) / data.batch for part in times[0]}
    flags = {"compiled": config.compile, "checkpointing": config.model.gradient_checkpointing}
    timing = StepTiming(
        model=name,
        variant=" and ".join(flag for flag, used in flags.items() if used) or "plain",
        **best,
        tflops=0.0,
        matrix_tflops=matrix_rate(device, half),
        peak_gib=peak,
    )
    # Counted without recomputation, which is no use of its own.
    once = replace(config, model=replace(config.model, gradient_checkpointing=False))
    useful = summarize_model(once, classes).train_flops_per_image
    return replace(timing, tflops=useful / timing.whole_ms / 1e9)


def make_steps(
    config: TrainConfig, classes: int, device: torch.device, half: bool
) -> tuple[Step, Step]:
    """The encoder's forward and backward pass alone, and the whole optimizer step."""
    loss, fused = config.loss, config.compile
    encoding = make_encoding(loss.encoding, loss.harmonics)
    model = PanopticModel(config.model, encoding.channels, classes, load_weights=False).to(device)
    blocks = model.encoder.config.num_hidden_layers
    optimizer = torch.optim.AdamW(parameter_groups(model, blocks, config.optim))
    set_learning_rate(optimizer, 0.0)
    network = torch.compile(model) if fused else model
    encoder = torch.compile(model.encoder) if fused else model.encoder
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    def encoder_alone(batch: Batch, _: Task) -> None:
        with autocast:
            photo = jitter_colour(batch.photo, batch.colour, batch.void)
            taps = encoder((photo - model.mean) / model.std).feature_maps
        # A scalar that every tap has a part in.
        torch.stack([tap.float().mean() for tap in taps]).sum().backward()
        optimizer.zero_grad()

    def whole_step(batch: Batch, task: Task) -> None:
        with autocast:
            found = network(jitter_colour(batch.photo, batch.colour, batch.void), task)
        if task == "instance":
            losses = instance_loss(found.instance, batch, encoding, loss, "norm", compiled=fused)
        else:
            losses = semantic_loss(found.semantic, batch, loss, compiled=fused)
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return encoder_alone, whole_step


def round_ms(
    work: Step, batches: Iterator[Batch], tasks: Sequence[Task], device: torch.device
) -> float:
    """Mean milliseconds of a step over some steps."""
    seconds = _seconds(lambda: [work(next(batches), task) for task in tasks], device)
    return seconds * 1e3 / len(tasks)


def matrix_rate(device: torch.device, half: bool) -> float:
    """TFLOP/s of a large matrix product on random values, measured."""
    side = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    product = a @ b
    seconds = _seconds(lambda: [torch.mm(a, b, out=product) for _ in range(10)], device)
    return 10 * 2 * side**3 / seconds / 1e12


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long work takes, the device's part of it included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
