"""The best checkpoint, the end of a run that gets no better, and going on from a given step."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from short_runs import make_config, same_run, saved_steps, write_config

from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.pipeline.base.config import load_config
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.train.checkpoint import TrainState, find_checkpoint
from panoptic_cache.train.config import TrainConfig, ValidationConfig
from panoptic_cache.train.loop import train
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.restore import load_model

QUALITY: dict[int, float] = {}


def scripted(
    model: PanopticModel, state: TrainState, samples: Iterable[Sample]
) -> Mapping[str, float]:
    """A metric that says what the test has written down for a step."""
    return {"pq": QUALITY[state.step]} if state.step in QUALITY else {}


def scripted_config(
    cache: Path, out: Path, quality: Mapping[int, float], **looks: Any
) -> TrainConfig:
    QUALITY.clear()
    QUALITY.update(quality)
    validation = ValidationConfig(
        cache=str(cache), every=2, samples=2, metric=f"{__name__}:scripted", keep_best=True
    )
    config = make_config(cache, out, pictures_every=0, checkpoint_every=1, keep=9)
    return replace(config, validation=replace(validation, **looks))


def best_step(run: Path) -> int:
    assert len(list((run / "best").iterdir())) == 1
    return load_model(run / "best")[1].step


def test_the_checkpoint_of_the_highest_pq_stays(tiny_cache: Path, tmp_path: Path) -> None:
    quality = {2: 0.3, 4: 0.5, 6: 0.5, 7: 0.4}
    config = scripted_config(tiny_cache, tmp_path, quality)
    train(replace(config, checkpoint_every=100, keep=1), trust_config=True)
    assert best_step(tmp_path) == 4
    assert saved_steps(tmp_path) == [7]
    assert find_checkpoint(tmp_path).name == "step_0000007"
    assert Predictor(tmp_path / "best").state.step == 4


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_same_best(tiny_cache: Path, tmp_path: Path) -> None:
    config = scripted_config(tiny_cache, tmp_path / "whole", {2: 0.3, 4: 0.5, 6: 0.4})
    train(config, trust_config=True)
    for step, best in ((3, 4), (5, 4)):
        part = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", part)
        for later in range(step + 1, 8):
            shutil.rmtree(part / f"checkpoints/step_{later:07d}")
        if best > step:
            shutil.rmtree(part / "best")
        train(replace(config, out=str(part)), resume=True, trust_config=True)
        assert same_run(tmp_path / "whole", part)
        assert best_step(part) == best
        ours, theirs = (load_model(run / "best")[0] for run in (part, tmp_path / "whole"))
        assert str(ours.state_dict()) == str(theirs.state_dict())


def test_a_run_that_gets_no_better_ends(tiny_cache: Path, tmp_path: Path) -> None:
    config = scripted_config(tiny_cache, tmp_path, {1: 0.4, 2: 0.5, 3: 0.4, 4: 0.5}, every=1)
    config = replace(config, checkpoint_every=100)
    patient = replace(config, validation=replace(config.validation, patience=2))
    assert train(patient, trust_config=True).name == "step_0000004"
    assert best_step(tmp_path) == 2
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(patient, resume=True, trust_config=True).name == "step_0000004"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert train(config, resume=True, trust_config=True).name == "step_0000007"


def test_a_best_that_was_never_measured_is_a_line(tiny_cache: Path, tmp_path: Path) -> None:
    config = scripted_config(tiny_cache, tmp_path, {})
    train(replace(config, steps=2), trust_config=True)
    with pytest.raises(InputError, match=r"best: no checkpoint was measured as the best \(give"):
        load_model(tmp_path / "best")


@pytest.mark.parametrize("setting", ["keep_best=true", "patience=3"])
def test_there_is_no_best_without_a_metric(tmp_path: Path, setting: str) -> None:
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(InputError, match="keep_best and validation"):
        load_config(TrainConfig, tmp_path / "c.toml", [f"validation.{setting}"])


def test_a_run_goes_on_from_a_given_step(run: Run, tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path / "whole", checkpoint_every=2, keep=9)
    file = write_config(config, tmp_path / "run.toml")
    assert run("train", file)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    weights = tmp_path / "again/checkpoints/step_0000006/model.safetensors"
    weights.write_bytes(b"")  # of a later step: not looked at
    settings = ("--set", f"out={tmp_path / 'again'}")
    assert run("train", file, "--resume", 4, *settings)[0] == 0
    assert same_run(tmp_path / "whole", tmp_path / "again")
    assert saved_steps(tmp_path / "again") == [2, 4, 6, 7]
    code, _, message = run("train", file, "--resume", 5, *settings)
    assert code == 1
    assert "no complete checkpoint of step 5 (there are: 2, 4, 6, 7)" in message
    assert run("train", file, 4, *settings)[0] == 2
