"""Fixtures shared by the test modules: made-up data, a cache of it, and the real samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from pipeline.config import RenderConfig
from pipeline.render import render
from pipeline.storage import Storage
from pipeline.synthetic import write_dataset


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
