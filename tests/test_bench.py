"""The step benchmark on a model of a few thousand weights; and that compiling changes no loss."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from panoptic_cache.train.bench import SMALL, bench_step, round_ms
from panoptic_cache.train.config import DataConfig, ModelConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.data import Batch
from panoptic_cache.train.loop import train
from panoptic_cache.train.model import Task
from panoptic_cache.train.summary import summarize_model

TINY = TrainConfig(
    precision="fp32",
    trackers=(),
    data=DataConfig(size=28, batch=4, micro_batch=2, workers=0),
    model=ModelConfig(
        backbone="random",
        random=RandomBackbone(hidden_size=32, layers=2, heads=2, patch_size=7, grid=4),
        taps=(1, 2),
        channels=16,
    ),
)


@pytest.mark.slow
def test_every_variant_has_a_column_and_every_part_a_line() -> None:
    found = bench_step(TINY, rounds=1)
    values = json.loads(json.dumps(found.values))
    assert [timing["variant"] for timing in values["timings"]] == ["plain", "checkpointing"]
    assert all(len(row) == len(found.columns) == 3 for row in found.rows)
    flops = summarize_model(TINY, 133).train_flops_per_image
    for timing, ratios in zip(values["timings"], values["ratios"], strict=True):
        whole = (2 * timing["instance_ms"] + timing["semantic_ms"]) / 3
        assert min(timing["encoder_ms"], timing["fed_ms"], whole) > 0
        assert timing["tflops"] == pytest.approx(flops / whole / 1e9)
        assert timing["peak_gib"] == 0 < timing["matrix_tflops"]
        assert ratios["fed_to_whole"] == pytest.approx(timing["fed_ms"] / whole)
        assert ratios["whole_to_encoder"] == pytest.approx(whole / timing["encoder_ms"])


def test_rounds_time_every_task_on_a_batch_of_its_own() -> None:
    seen: list[tuple[int, Task]] = []
    batches = iter(range(9))

    def work(batch: Batch, task: Task) -> None:
        seen.append((int(batch), task))  # type: ignore[call-overload]

    tasks: tuple[Task, ...] = ("instance", "instance", "semantic")
    assert round_ms(work, batches, tasks, torch.device("cpu")) > 0  # type: ignore[arg-type]
    assert seen == [(0, "instance"), (1, "instance"), (2, "semantic")]
    assert next(batches) == 3


@pytest.mark.slow
def test_the_small_model_has_the_proportions_of_the_large_ones() -> None:
    (config,) = SMALL.values()
    parts = summarize_model(config, 133).parameters
    assert 0.03 < (parts["decoder"] + parts["heads"]) / parts["encoder"] < 0.1


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of it but the C++ compiler, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for name, compiled in (("eager", False), ("compiled", True)):
        data = replace(TINY.data, cache=str(tiny_cache))
        out = tmp_path / name
        train(replace(TINY, out=str(out), steps=3, data=data, compile=compiled))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert {line["task"] for line in lines} == {"instance", "semantic"}
        losses.append([(line["loss"], line["norm"]) for line in lines])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))
