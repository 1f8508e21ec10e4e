"""Every row of Tables 2 and 3: trains, and its checkpoint decodes as it was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Run
from short_runs import lines_of, make_config, weights_of, write_config

from panoptic_cache.pipeline.base.config import load_config
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.loop import train


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


CHANNELS = {"direct": 3, "classification": 162}  # void has a channel an axis, or one
ROWS = [
    *("loss.eds=false", "loss.include_void=false", "loss.tv=0.0", "loss.dice=0.0"),
    *(f"loss.harmonics={harmonics}" for harmonics in (2, 3, 4, 5)),
    *(f"loss.encoding={encoding}" for encoding in CHANNELS),
    *(f"loss.instance={distance}" for distance in ("squared", "squared_then_norm", "norm")),
]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_row_trains_and_evaluates(
    run: Run, tiny_cache: Path, tiny_root: Path, tmp_path: Path, row: str
) -> None:
    out = tmp_path / "run"
    file = write_config(make_config(tiny_cache, out, steps=3), tmp_path / "run.toml")
    config = load_config(TrainConfig, file, [row])
    train(config)
    lines = lines_of(out)
    assert {line["task"] for line in lines} == {"instance", "semantic"}
    assert all(math.isfinite(line["loss"]) and line["norm"] > 0 for line in lines)
    for line in lines:
        weighted = line["pixel"] + config.loss.tv * line["tv"] + config.loss.dice * line["dice"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)
    channels = CHANNELS.get(config.loss.encoding, 4 * config.loss.harmonics)
    assert weights_of(out)["instance_head.weight"].shape[0] == channels

    code, printed, said = run(
        *("evaluate", "--checkpoint", out, "--coco", tiny_root, "--split", "val"),
        *("--out", tmp_path / "val", "--limit", 2, "--overlays", 0, "--json"),
    )
    assert code == 0, said
    result = json.loads(printed)
    assert result["images"] == 2
    assert 0 <= result["All"]["pq"] <= 1


@pytest.mark.slow
def test_weights_or_their_average_through_the_command_line(
    run: Run, tiny_cache: Path, tiny_root: Path, tmp_path: Path
) -> None:
    """After steps this large, the last weights and their average say different things."""
    out = tmp_path / "run"
    config = make_config(tiny_cache, out, steps=6, ema=0.999)
    train(replace(config, optim=replace(config.optim, lr=0.05, warmup_epochs=0.0)))
    photos = sorted((tiny_root / "val").iterdir())[:2]
    found: dict[str, list[bytes]] = {}
    for weights in ("model", "ema", ""):
        chosen = ("--weights", weights) if weights else ()
        folder = tmp_path / f"predict_{weights}"
        arguments = ("--checkpoint", out, "--out", folder, *chosen, "--device", "cpu")
        assert run("predict", *photos, *arguments)[0] == 0
        found[weights] = [p.read_bytes() for p in sorted(folder.rglob("*.png"))]
        folder = tmp_path / f"evaluate_{weights}"
        arguments = ("--checkpoint", out, "--out", folder, *chosen, "--device", "cpu")
        assert run("evaluate", *arguments, "--coco", tiny_root, "--split", "val")[0] == 0
        found[weights] += [p.read_bytes() for p in sorted((folder / "panoptic").iterdir())]
    assert len(found["model"]) >= 6
    assert found["ema"] == found[""]  # the average is the default
    assert found["ema"] != found["model"]
    assert not torch.equal(
        weights_of(out)["semantic_head.bias"], weights_of(out, "ema")["semantic_head.bias"]
    )


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_an_average_that_no_run_kept(
    run: Run, trained: Path, tiny_root: Path, tmp_path: Path, command: str
) -> None:
    arguments: tuple[object, ...] = ("--coco", tiny_root, "--split", "val")
    if command == "predict":
        arguments = (next((tiny_root / "val").iterdir()),)
    options = ("--checkpoint", trained, "--out", tmp_path / "out", "--weights", "ema")
    code, out, said = run(command, *arguments, *options)
    assert (code, out) == (1, "")
    (line,) = said.splitlines()
    assert "no moving average of the weights (use weights `model`, or train with" in line
    assert not (tmp_path / "out").exists()
