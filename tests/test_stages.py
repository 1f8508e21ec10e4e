"""Runs in stages, and the ratio of the tasks."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import Run
from short_runs import TINY_TOML

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.checkpoint import file_sha256, find_checkpoint, read_state
from panoptic_cache.train.config import TaskRatio
from panoptic_cache.train.loop import task_of
from panoptic_cache.train.stages import load_stages

STAGES = """
[[stages]]
tasks = {instance = 1, semantic = 0}

[[stages]]
optim = {lr = 1e-3}

[[stages]]
data = {size = 28}
"""


@pytest.fixture
def staged(tmp_path: Path, tiny_cache: Path) -> Path:
    """A configuration of three stages of two steps each."""
    path = tmp_path / "staged.toml"
    top = f'out = "{tmp_path / "out"}"\ncheckpoint_every = 1\nsteps = 2'
    cached = TINY_TOML.replace("[data]", f'[data]\ncache = "{tiny_cache}"')
    path.write_text(top + cached + STAGES)
    return path


def test_a_stage_holds_what_differs_and_settings_hold_for_all(staged: Path) -> None:
    first, second, third = load_stages(staged, ["optim.clip_norm=2", "data.size=42"])
    assert first.tasks == TaskRatio(1, 0)
    assert second.tasks == third.tasks == TaskRatio(2, 1)
    assert (first.optim.lr, second.optim.lr) == (5e-4, 1e-3)
    assert {run.optim.clip_norm for run in (first, second, third)} == {2}
    assert {run.data.size for run in (first, second, third)} == {42}
    assert first.model.init == ""
    assert (second.model.init, third.model.init) == (first.out, second.out)
    assert third.data.batch == 4  # of the file's own table


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optim = {lr", "optim = {lrr", "stage 2: optim: unknown key lrr"),
        ("[[stages]]\ndata", '[[stages]]\nout = "x"\ndata', "stage 3: a stage has no out"),
        ("instance = 1, semantic = 0", "instance = 0, semantic = 0", "tasks must train a head"),
    ],
)
def test_a_wrong_stage_is_named(staged: Path, old: str, new: str, message: str) -> None:
    staged.write_text(staged.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        load_stages(staged)


def test_a_run_stopped_within_a_stage_ends_with_the_same_weights(
    staged: Path, tmp_path: Path, run: Run
) -> None:
    assert run("train", staged)[0] == 0
    whole = tmp_path / "out"
    last = find_checkpoint(whole)
    assert last.parents[1].name == "stage-3"
    assert read_state(last).config.data.size == 28
    wanted = file_sha256(last / "model.safetensors")
    lines = [(whole / f"stage-{n}" / "metrics.jsonl").read_text() for n in (1, 2, 3)]
    assert '"semantic"' not in lines[0]

    # Stopped after the first step of the second stage.
    shutil.rmtree(whole / "stage-3")
    shutil.rmtree(whole / "stage-2" / "checkpoints" / "step_0000002")
    assert run("train", staged)[0] == 1  # without --resume nothing is overwritten
    assert run("train", staged, "--resume")[0] == 0
    assert file_sha256(find_checkpoint(whole) / "model.safetensors") == wanted
    assert run("train", staged, "--resume")[0] == 0  # nothing is left to do


@pytest.mark.parametrize("ratio", [TaskRatio(2, 1), TaskRatio(3, 2), TaskRatio(0, 1)])
def test_each_block_of_steps_has_the_ratio_of_the_tasks(ratio: TaskRatio) -> None:
    length = ratio.instance + ratio.semantic
    orders = set()
    for block in range(60):
        tasks = [task_of(7, block * length + place, ratio) for place in range(length)]
        assert Counter(tasks)["semantic"] == ratio.semantic
        orders.add(tuple(tasks))
    assert len(orders) > 1 or 0 in {ratio.instance, ratio.semantic}
