"""Small training runs, for several test modules: started, killed, compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file

from panoptic_cache.train.checkpoint import incomplete, latest_checkpoint, read_state
from panoptic_cache.train.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RandomBackbone,
    TrainConfig,
)

ROOT = Path(__file__).parents[1]
STEPS = 7
TIMES = {"images_per_second", "waited"}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["panoptic_cache.train.loop"])


def make_config(cache: Path, out: Path, **settings: Any) -> TrainConfig:
    """Seven steps of two micro-batches, checkpoints at 2, 4, 6 and 7, everything switched on."""
    config = TrainConfig(
        out=str(out),
        steps=STEPS,
        seed=1,
        precision="fp32",
        checkpoint_every=2,
        keep=2,
        trackers=(),
        data=DataConfig(cache=str(cache), size=28, batch=4, micro_batch=2, workers=0),
        model=ModelConfig(
            backbone="random",
            random=RandomBackbone(hidden_size=32, layers=3, heads=2, patch_size=7, grid=4),
            taps=(1, 2, 3),
            channels=16,
            drop_path=0.2,
        ),
        loss=LossConfig(instance="squared_then_norm"),
        optim=OptimConfig(lr=1e-3, warmup_epochs=1.0),
    )
    return replace(config, **settings)


def write_config(config: TrainConfig, file: Path) -> Path:
    """The configuration as a file, as `-m train` takes it."""
    file.write_bytes(tomli_w.dumps(config.to_dict()).encode())
    return file


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what differs from run to run."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines_of(run)]


def weights_of(run: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    folder = latest_checkpoint(run / "checkpoints")
    assert folder is not None
    weights: dict[str, torch.Tensor] = load_file(folder / f"{kind}.safetensors")
    return weights


def same_run(one: Path, other: Path) -> bool:
    """Whether the newest weights and all lines are the same, bit for bit."""
    a, b = weights_of(one), weights_of(other)
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return same and untimed(one) == untimed(other)


def saved_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    folders = sorted((run / "checkpoints").glob("step_*"))
    return [read_state(folder).step for folder in folders if incomplete(folder) is None]


TINY_TOML = """
precision = "fp32"
pictures_every = 0
trackers = []
[data]
size = 56
batch = 4
micro_batch = 4
workers = 0
[model]
backbone = "random"
taps = [1, 2]
channels = 8
[model.random]
hidden_size = 16
layers = 2
heads = 2
"""
"""A configuration of a run without steps, folder and cache."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(config: TrainConfig, folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """`-m train` below a launcher of its own session, with all that it says on standard error."""
    file = write_config(config, folder / "run.toml")
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "train", str(file), "--resume"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(run: Path, count: int, child: subprocess.Popen[str]) -> None:
    """Returns once `metrics.jsonl` has so many lines."""
    deadline = time.monotonic() + 100
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start_ranks(world: int, target: Any, *arguments: Any) -> list[Any]:
    """Processes that call a function as the ranks of a launcher do; quicker than one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        PROCESSES.Process(target=_as_rank, args=(rank, world, port, target, *arguments))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks: list[Any]) -> list[Any]:
    """Waits for ranks; their exit codes."""
    for rank in ranks:
        rank.join(100)
    return [rank.exitcode for rank in ranks]


def _as_rank(rank: int, world: int, port: int, target: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as below a launcher
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    target(*arguments)
