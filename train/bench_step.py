"""How fast training steps, against the encoder alone and the device's matrix rate.

Each variant of a configuration is timed in rounds of the three steps that training repeats, two
for instances and one for categories: the encoder alone, the whole step on a batch that lies there,
and the step fed by the real loader. The rounds alternate, so that all three see the same machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from panoptic_cache.pipeline.base.config import RenderConfig
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.progress import progress
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.render.bench import bench_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.train.augment import Augmentation, make_item
from panoptic_cache.train.batch import Batch, collate, jitter_colour
from panoptic_cache.train.config import DataConfig, ModelConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.data import indexed_loader
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.guards import memory_advice, smaller_steps
from panoptic_cache.train.losses import instance_loss, semantic_loss
from panoptic_cache.train.model import PanopticModel, Task
from panoptic_cache.train.optim import parameter_groups, set_learning_rate
from panoptic_cache.train.summary import summarize_model

ROUND: tuple[Task, ...] = ("instance", "instance", "semantic")

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
"""The smallest and the largest of the paper's rows, as `configs/` has them."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One variant of a model; milliseconds an image, of the best round.

    Attributes:
        model: Which one.
        variant: What it does differently.
        encoder_ms: The encoder alone, forward and backward.
        instance_ms: The whole step of the instance task.
        semantic_ms: The same of the semantic task.
        fed_ms: The whole step, tasks alternating, fed by the loader.
        tflops: TFLOP/s of the whole step, tasks alternating; what is recomputed does not count.
        matrix_tflops: TFLOP/s of a large matrix product on this device.
        peak_gib: Of the device's memory; 0 on a processor.
    """

    model: str
    variant: str
    encoder_ms: float
    instance_ms: float
    semantic_ms: float
    fed_ms: float
    tflops: float
    matrix_tflops: float
    peak_gib: float

    @property
    def whole_ms(self) -> float:
        """The whole step, averaged over the tasks as they alternate."""
        return (2 * self.instance_ms + self.semantic_ms) / 3


@dataclass(frozen=True, slots=True)
class StepBench:
    """Training steps of one run.

    Attributes:
        title: On what.
        timings: A line each.
    """

    title: str
    timings: tuple[StepTiming, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """A column for each variant."""
        return ("ms/image", *(f"{t.model}: {t.variant}" for t in self.timings))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `bench step --json` prints them."""
        return asdict(self) | {
            "ratios": [
                {
                    "whole_to_encoder": t.whole_ms / t.encoder_ms,
                    "fed_to_whole": t.fed_ms / t.whole_ms,
                }
                for t in self.timings
            ]
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each part of a step, then one for each ratio."""
        lines: dict[str, Callable[[StepTiming], str]] = {
            "the encoder alone, forward and backward": lambda t: f"{t.encoder_ms:.1f}",
            "the whole step, instance task": lambda t: f"{t.instance_ms:.1f}",
            "the whole step, semantic task": lambda t: f"{t.semantic_ms:.1f}",
            "both as they alternate, fed by the loader": lambda t: f"{t.fed_ms:.1f}",
            "images/s": lambda t: f"{1e3 / t.fed_ms:.1f}",
            "whole step against encoder alone": lambda t: f"{t.whole_ms / t.encoder_ms:.2f}",
            "fed against whole step": lambda t: f"{t.fed_ms / t.whole_ms:.2f}",
            "TFLOP/s": lambda t: f"{t.tflops:.3g}",
            "part of the matrix rate": lambda t: f"{t.tflops / t.matrix_tflops:.2f}",
        }
        if any(t.peak_gib for t in self.timings):
            lines["GiB of the device's memory"] = lambda t: f"{t.peak_gib:.1f}"
        return [(name, *map(value, self.timings)) for name, value in lines.items()]


def bench_step(
    config: TrainConfig | None = None,
    *,
    classes: int = 133,
    rounds: int = 3,
    compiled: bool | None = None,
) -> StepBench:
    """Times training steps with and without gradient checkpointing and `torch.compile`.

    Args:
        config: Model, losses and sizes; its micro-batch is what a step takes. Without one, the
            paper's on a GPU, a small one elsewhere.
        classes: Categories of the semantic head.
        rounds: Of three steps; the best counts, after one to warm up.
        compiled: Try `torch.compile` too; on a GPU by default, as it takes minutes elsewhere.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    models = {"as configured": config} if config else LARGE if on_gpu else SMALL
    compilations = (False, True) if (on_gpu if compiled is None else compiled) else (False,)
    variants = [
        (name, model, recompute, fused)
        for name, model in models.items()
        for fused in compilations
        for recompute in (False, True)
    ]
    timings = []
    with progress("bench", len(variants), "variants") as advance:
        for name, model, recompute, fused in variants:
            run = replace(
                model, compile=fused, model=replace(model.model, gradient_checkpointing=recompute)
            )
            with memory_advice(smaller_steps(run)):
                timings.append(time_variant(name, run, classes, rounds, device))
            advance(1, name)
    where = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"the processor, {torch.get_num_threads()} threads"
    )
    return StepBench(f"training steps on {where}", tuple(timings))


def half(config: TrainConfig, device: torch.device) -> bool:
    """Whether the network computes in bfloat16."""
    return config.precision == "bf16" and device.type == "cuda"


def time_variant(
    name: str, config: TrainConfig, classes: int, rounds: int, device: torch.device
) -> StepTiming:
    """Times one variant; see `bench_step`."""
    data = replace(config.data, batch=config.data.micro_batch, cache="")
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
    model = PanopticModel(config.model, encoding.channels, classes, load_weights=False).to(device)
    blocks = model.encoder.config.num_hidden_layers
    optimizer = torch.optim.AdamW(parameter_groups(model, blocks, config.optim))
    set_learning_rate(optimizer, 0.0)
    network = torch.compile(model) if config.compile else model
    encoder = torch.compile(model.encoder) if config.compile else model.encoder
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half(config, device))

    def encoder_alone(batch: Batch, _: Task) -> None:
        with autocast:
            photo = jitter_colour(batch.photo, batch.colour, batch.void)
            taps = encoder((photo - model.mean) / model.std).feature_maps
        mean_of(taps).backward()
        optimizer.zero_grad()

    def whole_step(batch: Batch, task: Task) -> None:
        with autocast:
            found = network(jitter_colour(batch.photo, batch.colour, batch.void), task)
        losses = (
            instance_loss(
                found.instance, batch, encoding, config.loss, "norm", compiled=config.compile
            )
            if task == "instance"
            else semantic_loss(found.semantic, batch, config.loss, compiled=config.compile)
        )
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with bench_dataset(None, 64) as dataset, tempfile.TemporaryDirectory() as folder:
        fit = RenderConfig("squash", data.size)
        render(dataset, "bench", Storage(folder), fit, workers=0)
        reader = ShardReader(Path(folder))
        items = [make_item(reader.sample(p % 64), data, Augmentation()) for p in range(data.batch)]
        still = repeat(collate(items).to(device))
        steps = range(len(ROUND) * (rounds + 1))
        loader = indexed_loader(reader, data, seed=0, steps=steps, pin=device.type == "cuda")
        fed = (batch.to(device) for batch in loader)
        best: dict[str, float] = {}
        for turn in range(rounds + 1):
            times = {
                "encoder": round_ms(encoder_alone, still, ROUND, device),
                "instance": round_ms(whole_step, still, ("instance",) * 2, device),
                "semantic": round_ms(whole_step, still, ("semantic",), device),
                "fed": round_ms(whole_step, fed, ROUND, device),
            }
            if turn:  # the first compiles, and fills the loader's queue
                best = {part: min(ms, best.get(part, ms)) for part, ms in times.items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    each = {name: ms / data.batch for name, ms in best.items()}
    whole = (2 * each["instance"] + each["semantic"]) / 3
    # Recomputing is no use of its own.
    once = replace(config, model=replace(config.model, gradient_checkpointing=False))
    useful = summarize_model(once, classes).train_flops_per_image
    flags = {"compiled": config.compile, "checkpointing": config.model.gradient_checkpointing}
    return StepTiming(
        model=name,
        variant=" and ".join(flag for flag, used in flags.items() if used) or "plain",
        encoder_ms=each["encoder"],
        instance_ms=each["instance"],
        semantic_ms=each["semantic"],
        fed_ms=each["fed"],
        tflops=useful / whole / 1e9,
        matrix_tflops=matrix_rate(device, half(config, device)),
        peak_gib=peak / 2**30,
    )


def mean_of(taps: Sequence[Tensor]) -> Tensor:
    """A scalar that every tap has a part in."""
    return torch.stack([tap.float().mean() for tap in taps]).sum()


def round_ms(
    work: Callable[[Batch, Task], None],
    batches: Iterator[Batch],
    tasks: Sequence[Task],
    device: torch.device,
) -> float:
    """Mean milliseconds of a step over some steps."""
    _wait(device)
    start = time.perf_counter()
    for task in tasks:
        work(next(batches), task)
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / len(tasks)


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
