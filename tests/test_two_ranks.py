"""Real ranks, killed, stopped and resumed; and the launchers above them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from short_runs import (
    ROOT,
    TORCHRUN,
    finish,
    lines_of,
    make_config,
    same_run,
    saved_steps,
    start,
    start_ranks,
    wait_for_lines,
    weights_of,
    write_config,
)

import panoptic_cache.train.loop
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.train.caches import Mix
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.data import step_places
from panoptic_cache.train.loader import iterate
from panoptic_cache.train.loop import train as train_run
from panoptic_cache.train.stopping import alone

LONG = 24
"""Steps: enough to be killed several times."""


@pytest.fixture(autouse=True)
def one_thread_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic in all processes, bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def long_config(cache: Path, out: Path, workers: int = 0) -> TrainConfig:
    config = make_config(cache, out, steps=LONG, checkpoint_every=3, ema=0.9)
    return replace(config, data=replace(config.data, workers=workers))


def resume(config: TrainConfig) -> None:
    """What each rank does; out of the test's process."""
    train_run(config, resume=True)


@pytest.fixture(scope="module")
def whole(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two ranks that nothing interrupted. Read only."""
    out = tmp_path_factory.mktemp("two") / "whole"
    assert finish(start_ranks(2, resume, long_config(tiny_cache, out))) == [0, 0]
    return out


def same_to_the_average(one: Path, other: Path) -> bool:
    a, b = weights_of(one, "ema"), weights_of(other, "ema")
    return same_run(one, other) and all(torch.equal(a[name], b[name]) for name in a)


def wait_for_saving(run: Path) -> None:
    """Returns in the middle of a checkpoint, later than the ones there are."""
    deadline = time.monotonic() + 60
    while not any(run.glob("checkpoints/.tmp-*/optimizer.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.slow
def test_two_ranks_killed_again_and_again_go_on_bit_for_bit(
    whole: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """Both or one, in a step or while saving; and with any number of loader processes.

    A loader process ends, and its copies of its rank's sockets with it, up to five seconds after
    its rank was killed. Only then does the other rank notice.
    """
    moments = random.Random(0)
    for turn, victims in enumerate(((0, 1), (1,), (0,))):
        config = long_config(tiny_cache, tmp_path, workers=turn % 2)
        ranks = start_ranks(2, resume, config)
        deadline = time.monotonic() + 60
        metrics = tmp_path / "metrics.jsonl"
        goal = max(saved_steps(tmp_path), default=0) + 4
        while not metrics.exists() or len(metrics.read_text().splitlines()) < goal:
            assert time.monotonic() < deadline
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.002)
        if turn % 2 == 0:
            wait_for_saving(tmp_path)
        else:
            time.sleep(moments.uniform(0, 0.1))
        for victim in victims:
            os.kill(ranks[victim].pid, signal.SIGKILL)
        codes = finish(ranks)  # who is left alone does not wait for ever
        assert all(codes[victim] == -signal.SIGKILL for victim in victims)
        assert 0 not in codes
    assert finish(start_ranks(2, resume, long_config(tiny_cache, tmp_path, workers=2))) == [0, 0]
    assert same_to_the_average(whole, tmp_path)


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether all end within seconds; one that nobody has yet asked how it ended has ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(map(is_at_work, processes)):
            return True
        time.sleep(0.05)
    return False


def is_at_work(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_two_ranks_stop_when_their_launcher_passes_a_signal_on(
    whole: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = long_config(tiny_cache, run, workers=1)
    launcher = start(config, tmp_path, *TORCHRUN, "2")
    wait_for_lines(run, 4, launcher)
    below = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert all_gone(below)
    step = max(saved_steps(run))
    assert 4 <= step < LONG
    assert said.count("stopped by SIGTERM") == 1
    assert [line["step"] for line in lines_of(run)] == list(range(1, step + 1))
    folder = run / f"checkpoints/step_{step:07d}"
    assert {path.name for path in folder.glob("rng_*")} == {"rng_0.pt", "rng_1.pt"}

    assert finish(start_ranks(2, resume, config)) == [0, 0]
    assert same_to_the_average(whole, run)


@pytest.mark.slow
def test_a_launcher_that_passes_nothing_on_and_the_run_that_comes_next(
    tiny_cache: Path, tmp_path: Path
) -> None:
    """`accelerate launch` dies at once; the next run waits for its rank, and is stopped, too."""
    run = tmp_path / "run"
    config = replace(long_config(tiny_cache, run, workers=1), steps=150, checkpoint_every=1000)
    options = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no")
    launcher = start(
        config, tmp_path, "-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"
    )
    wait_for_lines(run, 4, launcher)
    launcher.send_signal(signal.SIGTERM)
    following = start(config, tmp_path)
    _, said = launcher.communicate(timeout=60)  # ends with the last process that can speak
    first = max(saved_steps(run))
    assert f"stopped by SIGTERM: {run}/checkpoints/step_{first:07d} is complete" in said

    wait_for_lines(run, first + 2, following)
    os.killpg(following.pid, signal.SIGINT)  # its loader processes get it, too
    _, said = following.communicate(timeout=60)
    assert following.returncode == 130, said
    step = max(saved_steps(run))
    assert first < step < 150
    assert [line["step"] for line in lines_of(run)] == list(range(1, step + 1))
    folder = run / f"checkpoints/step_{step:07d}"
    assert f"stopped by SIGINT: {folder} is complete, --resume goes on" in said
    assert "Traceback" not in said

    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    assert finish(start_ranks(1, resume, config)) == [0]
    assert finish(start_ranks(1, resume, undisturbed)) == [0]
    assert same_to_the_average(tmp_path / "undisturbed", run)


# Whose samples


def train_and_note(config: TrainConfig, notes: Path) -> None:
    """Trains and writes down the keys of this rank's batches."""
    original = iterate

    def noting(loader: Any, request: Any) -> Any:
        with (notes / f"{os.environ['RANK']}.jsonl").open("w") as file:
            for batch in original(loader, request):
                print(json.dumps(batch.keys), file=file, flush=True)
                yield batch

    panoptic_cache.train.loop.iterate = noting  # type: ignore[attr-defined, assignment]
    train_run(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "workers", "batch", "micro"),
    [
        (3, 2, 9, 3),  # epochs of 12 samples end within a step
        (2, 1, 20, 5),  # the batch is larger than the cache
    ],
)
def test_every_sample_once_an_epoch_and_nobody_hangs(
    tiny_cache: Path, tmp_path: Path, world: int, workers: int, batch: int, micro: int
) -> None:
    steps = 4
    config = make_config(tiny_cache, tmp_path / "run", steps=steps)
    data = replace(config.data, workers=workers, batch=batch, micro_batch=micro)
    config = replace(config, data=data)
    assert finish(start_ranks(world, train_and_note, config, tmp_path)) == [0] * world
    seen = [
        [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
        for rank in range(world)
    ]
    a_step = batch // micro // world
    assert {len(batches) for batches in seen} == {steps * a_step}
    counts = Counter[str]()
    for step in range(steps):
        together = [
            key
            for batches in seen
            for keys in batches[step * a_step : (step + 1) * a_step]
            for key in keys
        ]
        assert len(together) == len(step_places(1, Mix((12,), (12,)), batch, step)) == batch
        counts.update(together)
        # Whole epochs and a part of one: no sample is one ahead of another by more than one.
        assert max(counts.values()) - (min(counts.values()) if len(counts) == 12 else 0) <= 1
    assert sum(counts.values()) == steps * batch


# What goes wrong on several ranks is one line


def damage_a_photo(cache: Path) -> str:
    """Zeroes a photo; its key."""
    sidecar = sorted(cache.glob("train-*.json"))[1]
    entry = json.loads(sidecar.read_text())["samples"][2]
    offset, size = entry["members"][1]  # the photo, see MEMBERS
    with sidecar.with_suffix(".tar").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    return str(entry["key"])


@pytest.mark.slow
def test_all_ranks_together_say_one_line(cache: Path, tmp_path: Path) -> None:
    """What one rank met, it says alone; the other, which lost it, is ended without a word."""
    config = make_config(cache, tmp_path / "run")
    wanted = f"train-00001.tar: {damage_a_photo(cache)}.jpg: photo damaged"
    file = write_config(config, tmp_path / "run.toml")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", "-m", "train", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    # What torchrun itself adds begins with its log's letter or follows its own traceback.
    ours = [line for line in done.stderr.splitlines() if not line.startswith(("W", "E", " "))]
    ours = ours[: next(n for n, line in enumerate(ours) if line.startswith("Traceback"))]
    assert len([line for line in ours if wanted in line]) == 1, done.stderr
    assert [line for line in ours if line and wanted not in line and "/s, " not in line] == []


def test_a_folder_is_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("panoptic_cache.train.stopping.PATIENCE", 0.0)
    with (
        alone(run),
        pytest.raises(InputError, match="another run is writing here"),
        alone(run),
    ):
        pass
    assert not run.exists()  # nothing was written
    with alone(run):
        (run / "metrics.jsonl").touch()
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_run_waits_for_another_that_is_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Storage(str(tmp_path)).locked()
    other.__enter__()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            other.__exit__(None, None, None)

    monkeypatch.setattr("panoptic_cache.train.stopping.time.sleep", nap)
    with alone(tmp_path):
        assert len(naps) == 2
