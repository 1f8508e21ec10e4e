"""Fixtures shared by the test modules: made-up data, a cache of it, and the real samples."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from panoptic_cache import cli
from panoptic_cache.pipeline.base.config import build_config
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.scenes.scene import write_dataset
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.loop import train

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def one_thread_without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that trains in this process: reproducible, and the next one may train as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a made-up dataset in COCO's layout: 12 images in `train`, 4 in `val`. Read only."""
    root = tmp_path_factory.mktemp("tiny") / "coco"
    write_dataset(root, images=12, val_images=4, seed=0, size=64)
    return root


@pytest.fixture(scope="session")
def tiny_dataset(tiny_root: Path) -> CocoPanoptic:
    """The `train` split of `tiny_root`."""
    return read_dataset(CocoLayout.of(tiny_root, "train"))


@pytest.fixture(scope="session")
def tiny_cache(tiny_dataset: CocoPanoptic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished cache of `tiny_dataset`: three shards of four. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "cache"
    render(
        tiny_dataset, "train", Storage(str(folder)), RenderConfig(samples_per_shard=4), workers=0
    )
    return folder


@pytest.fixture
def cache(tiny_cache: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_cache` to do harm to."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


@pytest.fixture
def root(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_root` to do harm to."""
    return Path(shutil.copytree(tiny_root, tmp_path / "coco"))


@pytest.fixture(scope="session")
def coco_sample() -> Path:
    """Root of 16 real COCO images, split `val2017`; they are no part of the repository."""
    root = Path(__file__).parents[1] / "../shared/coco_sample"
    if not root.is_dir():
        pytest.skip("the real COCO samples are not on this machine")
    return root.resolve()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Run:
    """Runs a command line in this process: exit code, standard output, logged warnings."""

    def call(*arguments: object) -> tuple[int, str, str]:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["panoptic", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, _ = capsys.readouterr()
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        return int(exit_.value.code or 0), out, "\n".join(lines)

    return call


@pytest.fixture(scope="session")
def trained(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps: enough to predict, not to be right."""
    out = tmp_path_factory.mktemp("trained") / "run"
    random = {"hidden_size": 16, "layers": 2, "heads": 2, "patch_size": 7}
    values: dict[str, Any] = {
        "out": str(out),
        "steps": 2,
        "precision": "fp32",
        "data": {"cache": str(tiny_cache), "size": 56, "batch": 4, "micro_batch": 4, "workers": 0},
        "model": {"backbone": "random", "random": random, "taps": [1, 2], "channels": 8},
    }
    train(build_config(TrainConfig, values, where="test"))
    return out
