"""How fast training is fed and how fast it steps, each against its floor.

`bench_load`: one training sample on one core, from the cache, online, and the photo alone.
`bench_step`: optimizer steps, of the encoder alone, on a batch in memory, and fed by the loader.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.sample import encode_distance
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import CocoLayout, PanopticRecord
from panoptic_cache.pipeline.photo import decode_photo
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
from panoptic_cache.train.caches import open_caches
from panoptic_cache.train.config import DataConfig, ModelConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.data import Batch, Share, collate
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.loader import make_loader
from panoptic_cache.train.losses import instance_loss, semantic_loss
from panoptic_cache.train.model import HALF, Task, new_model
from panoptic_cache.train.optim import parameter_groups, set_learning_rate
from panoptic_cache.train.stopping import memory_advice, smaller_steps
from panoptic_cache.train.summary import summarize_model

# Loading


def bench_load(layout: CocoLayout | None = None, images: int = 32, size: int = 420) -> BenchTable:
    """Makes training samples on one core: from the cache, online, and only the photo.

    Without a layout of made-up scenes. `size` is the side of the network's input, and of the cache.
    """
    cv2.setNumThreads(1)
    config = DataConfig(size=size)
    with bench_dataset(layout, images) as dataset, tempfile.TemporaryDirectory() as folder:
        render(dataset, "bench", Storage(folder), RenderConfig("squash", size), workers=0)
        reader, records = ShardReader(Path(folder)), dataset.records
        count = len(reader)

        def cached(position: int) -> None:
            augmentation = draw_augmentation(config, 0, (0, position))
            make_item(reader.sample(position), config, augmentation)

        ways: dict[str, Callable[[int], object]] = {
            "online, the obvious way: Pillow, scipy, a loop": lambda n: obvious(records[n], size),
            "online, by our functions": lambda n: online(records[n], size),
            "from the cache": cached,
            "the floor: JPEG decode and resize": lambda n: photo_only(records[n], size),
        }
        timings = [
            Timing(name, best_ms(lambda: [work(n) for n in range(count)], count))  # noqa: B023
            for name, work in ways.items()
        ]
    slow, fast, ours, floor = (each.ms for each in timings)
    return timing_table(
        f"one training sample at {size} px, {count} images on one core",
        timings,
        {
            "the cache against online, the obvious way": slow / ours,
            "the cache against online, by our functions": fast / ours,
            "the cache against the floor": ours / floor,
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
    decode_photo(record.photo.read_bytes(), record.photo.name, (size, size))


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
LINES = {
    "encoder_ms": "the encoder alone, forward and backward, ms/image",
    "instance_ms": "the whole step, instance task",
    "semantic_ms": "the whole step, semantic task",
    "fed_ms": "both as they alternate, fed by the loader",
    "images_per_second": "images/s",
    "whole_to_encoder": "whole step against encoder alone",
    "fed_to_whole": "fed against whole step",
    "tflops": "TFLOP/s",
    "part_of_matrix_rate": "part of the rate of a large matrix product",
    "peak_gib": "GiB of the device's memory",
}
"""Of the table, by their name in the JSON."""


def bench_step(
    config: TrainConfig | None = None,
    *,
    classes: int = 133,
    rounds: int = 3,
    compiled: bool | None = None,
) -> BenchTable:
    """Times training steps with and without gradient checkpointing and `torch.compile`.

    A step takes one micro-batch. Without a configuration: the paper's models on a GPU, a small one
    elsewhere. The best of `rounds` of three steps counts, after one to warm up. `compiled` tries
    `torch.compile` too; by default on a GPU only, as it takes minutes elsewhere.
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
    timings, ratios = [], []
    with progress("bench", len(variants), "variants") as advance:
        for name, run in variants:
            with memory_advice(smaller_steps(run)):
                timing, ratio = time_variant(run, classes, rounds, device)
            timings.append({"model": name, **timing})
            ratios.append(ratio)
            advance(1, name)
    threads = f"the processor, {torch.get_num_threads()} threads"
    title = f"training steps on {torch.cuda.get_device_name(device) if on_gpu else threads}"
    columns = ("", *(f"{timing['model']}: {timing['variant']}" for timing in timings))
    measured = [timing | ratio for timing, ratio in zip(timings, ratios, strict=True)]
    rows = [(line, *(f"{each[name]:.4g}" for each in measured)) for name, line in LINES.items()]
    return BenchTable(title, columns, rows, {"title": title, "timings": timings, "ratios": ratios})


def time_variant(
    config: TrainConfig, classes: int, rounds: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, float]]:
    """One variant's timings and ratios, see `LINES`."""
    on_gpu = device.type == "cuda"
    half = HALF.get(config.precision) if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    encoder_alone, whole_step = make_steps(config, classes, device, half)
    data = replace(config.data, batch=config.data.micro_batch, cache="", caches=())
    with bench_dataset(None, 64) as dataset, tempfile.TemporaryDirectory() as folder:
        render(dataset, "bench", Storage(folder), RenderConfig("squash", data.size), workers=0)
        reader, cached = ShardReader(Path(folder)), replace(data, cache=folder)
        items = [make_item(reader.sample(p % 64), data, Augmentation()) for p in range(data.batch)]
        still = repeat(collate(items).to(device))
        steps = range(len(ROUND) * (rounds + 1))
        share, caches = Share(seed=0, steps=steps), open_caches(cached)
        loader = make_loader(cached, caches, share, pin=on_gpu)
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
    whole_ms = (2 * best["instance_ms"] + best["semantic_ms"]) / 3  # as the tasks alternate
    # Counted without recomputation, which is no use of its own.
    once = replace(config, model=replace(config.model, gradient_checkpointing=False))
    tflops = summarize_model(once, classes).train_flops_per_image / whole_ms / 1e9
    matrix_tflops = matrix_rate(device, half)
    flags = {"compiled": config.compile, "checkpointing": config.model.gradient_checkpointing}
    variant = " and ".join(flag for flag, used in flags.items() if used) or "plain"
    rates = {"tflops": tflops, "matrix_tflops": matrix_tflops, "peak_gib": peak}
    return {"variant": variant, **best, **rates}, {
        "whole_to_encoder": whole_ms / best["encoder_ms"],
        "fed_to_whole": best["fed_ms"] / whole_ms,
        "images_per_second": 1e3 / best["fed_ms"],
        "part_of_matrix_rate": tflops / matrix_tflops,
    }


def make_steps(
    config: TrainConfig, classes: int, device: torch.device, half: torch.dtype | None
) -> tuple[Step, Step]:
    """The encoder's forward and backward pass alone, and the whole optimizer step."""
    loss, fused = config.loss, config.compile
    encoding = make_encoding(loss.encoding, loss.harmonics)
    model = new_model(config, classes, load_weights=False).to(device)
    blocks = model.encoder.config.num_hidden_layers
    optimizer = torch.optim.AdamW(parameter_groups(model, blocks, config.optim))
    set_learning_rate(optimizer, 0.0)
    network = torch.compile(model) if fused else model
    encoder = torch.compile(model.encoder) if fused else model.encoder
    autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)

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
    return seconds(lambda: [work(next(batches), task) for task in tasks], device) * 1e3 / len(tasks)


def matrix_rate(device: torch.device, half: torch.dtype | None) -> float:
    """TFLOP/s of a large matrix product on random values, measured."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=half or torch.float32) for _ in range(2))
    product = a @ b
    times = seconds(lambda: [torch.mm(a, b, out=product) for _ in range(10)], device)
    return 10 * 2 * side**3 / times / 1e12


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long work takes, the device's part of it included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start
