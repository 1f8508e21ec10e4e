"""How fast training is fed and steps, each against the obvious way and the floor."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.bench import Bench, Timing, bench_dataset, best_ms, obvious_targets
from pipeline.coco import CocoLayout, PanopticRecord
from pipeline.config import RenderConfig
from pipeline.ids import read_ids
from pipeline.render import render
from pipeline.sample import encode_distance
from pipeline.shards import ShardReader
from pipeline.storage import Storage
from pipeline.targets import compute_targets, index_map, resize_index
from train.config import DataConfig, TrainConfig
from train.data import Batch, collate, indexed_loader, jitter_colour
from train.encoding import make_encoding
from train.items import Augmentation, draw_augmentation, make_item
from train.losses import instance_loss
from train.model import PanopticModel
from train.optim import parameter_groups, set_learning_rate
from train.summary import summarize_model


def bench_load(layout: CocoLayout | None = None, images: int = 32, size: int = 420) -> Bench:
    """Makes training samples on one core: from the cache, online, and only the photo.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many.
        size: Side of the network's input, and of the cache.
    """
    cv2.setNumThreads(1)
    config = DataConfig(size=size)
    with bench_dataset(layout, images) as dataset, tempfile.TemporaryDirectory() as folder:
        render(dataset, "bench", Storage(folder), RenderConfig("squash", size), workers=0)
        reader, records = ShardReader(Path(folder)), dataset.records
        count = len(reader)

        def cached() -> None:
            for position in range(count):
                augmentation = draw_augmentation(config, 0, (0, position))
                make_item(reader.sample(position), config, augmentation)

        def each(work: Callable[[PanopticRecord, int], None]) -> Callable[[], None]:
            def run() -> None:
                for record in records:
                    work(record, size)

            return run

        timings = (
            Timing("online, the obvious way: Pillow, scipy, a loop", best_ms(each(obvious), count)),
            Timing("online, by our functions", best_ms(each(online), count)),
            Timing("from the cache", best_ms(cached, count)),
            Timing("the floor: JPEG decode and resize", best_ms(each(photo_only), count)),
        )
    slow, fast, ours, floor = (timing.ms for timing in timings)
    return Bench(
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
    index = index_map(read_ids(record.png), [segment.id for segment in record.segments])
    iscrowd = [segment.iscrowd for segment in record.segments]
    targets = compute_targets(resize_index(index, (size, size)), iscrowd)
    encode_distance(targets.distance)
    photo_only(record, size)


def photo_only(record: PanopticRecord, size: int) -> None:
    """What any training must do: decode a photo and resize it."""
    photo = simplejpeg.decode_jpeg(
        record.photo.read_bytes(), "RGB", min_height=size, min_width=size
    )
    cv2.resize(photo, (size, size), interpolation=cv2.INTER_AREA)


def bench_step(config: TrainConfig, *, classes: int = 133, steps: int = 5) -> Bench:
    """Times the encoder alone, the whole step, and the step fed by the real loader.

    Args:
        config: Model, losses and sizes; its micro-batch is what a step takes.
        classes: Categories of the semantic head.
        steps: To average over, after one to warm up.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = config.precision == "bf16" and device.type == "cuda"
    data = replace(config.data, batch=config.data.micro_batch)
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
    model = PanopticModel(config.model, encoding.channels, classes, load_weights=False).to(device)
    blocks = model.encoder.config.num_hidden_layers
    optimizer = torch.optim.AdamW(parameter_groups(model, blocks, config.optim))
    set_learning_rate(optimizer, 0.0)
    network = torch.compile(model) if config.compile else model

    def encoder_alone(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            photo = jitter_colour(batch.photo, batch.colour)
            taps = model.encoder((photo - model.mean) / model.std).feature_maps
        torch.stack([tap.float().mean() for tap in taps]).sum().backward()
        optimizer.zero_grad()

    def whole_step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            prediction = network(jitter_colour(batch.photo, batch.colour), "instance")
        instance_loss(prediction.instance, batch, encoding, config.loss, "norm").total.backward()
        optimizer.step()
        optimizer.zero_grad()

    with bench_dataset(None, 64) as dataset, tempfile.TemporaryDirectory() as folder:
        fit = RenderConfig("squash", data.size)
        render(dataset, "bench", Storage(folder), fit, workers=0)
        reader = ShardReader(Path(folder))
        still = collate(
            [make_item(reader.sample(p % 64), data, Augmentation()) for p in range(data.batch)]
        ).to(device)
        loader = indexed_loader(
            reader, data, seed=0, steps=range(steps + 1), pin=device.type == "cuda"
        )
        fed = (batch.to(device) for batch in loader)
        encoder_ms = step_ms(encoder_alone, cycle([still]), steps, device) / data.batch
        whole_ms = step_ms(whole_step, cycle([still]), steps, device) / data.batch
        fed_ms = step_ms(whole_step, fed, steps, device) / data.batch
    flops = summarize_model(config, classes).train_flops_per_image
    peak = matrix_rate(device, half)
    return Bench(
        f"training steps of {data.batch} at {data.size} px on {device.type}",
        (
            Timing("encoder alone, forward and backward", encoder_ms),
            Timing("the whole step", whole_ms),
            Timing("the step fed by the loader", fed_ms),
        ),
        {
            "whole step against encoder alone": whole_ms / encoder_ms,
            "fed against whole step": fed_ms / whole_ms,
            "TFLOP/s": flops / whole_ms / 1e9,
            "part of the device's matrix rate": flops / whole_ms / 1e9 / peak,
        },
    )


def step_ms(
    work: Callable[[Batch], None], batches: Iterator[Batch], steps: int, device: torch.device
) -> float:
    """Mean milliseconds of a step, after one to warm up."""
    work(next(batches))
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        work(next(batches))
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / steps


def matrix_rate(device: torch.device, half: bool) -> float:
    """TFLOP/s of a large matrix product on random values, measured."""
    side = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    _wait(device)
    return 10 * 2 * side**3 / (time.perf_counter() - start) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
