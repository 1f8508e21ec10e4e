"""Five thousand images: planning is quick, and memory and graph stay small. See also scale.py."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import pytest
from scale import SPLIT, measured, render_step, write_links

from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.render.plan import RenderConfig, make_plan
from panoptic_cache.pipeline.scenes.scene import write_dataset

IMAGES = 5000


@pytest.fixture(scope="module")
def large_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of links to a few small scenes."""
    folder = tmp_path_factory.mktemp("large")
    write_dataset(folder / "few", images=16, val_images=0, seed=0, size=64)
    write_links(CocoLayout.of(folder / "few", "train"), folder / "coco", IMAGES)
    return folder / "coco"


@pytest.fixture(scope="module")
def large(large_root: Path) -> CocoPanoptic:
    return read_dataset(CocoLayout.of(large_root, SPLIT))


@pytest.mark.slow
def test_every_image_is_planned_once(large: CocoPanoptic) -> None:
    plan = make_plan(large, SPLIT, RenderConfig())
    keys = [record.key for shard in plan.shards for record in shard.records]
    assert len(keys) == len(set(keys)) == IMAGES
    assert len(plan.shards) == -(-IMAGES // 256)


@pytest.mark.slow
def test_a_task_carries_its_own_slice_and_no_more(large: CocoPanoptic) -> None:
    shard = make_plan(large, SPLIT, RenderConfig()).shards[0]
    # About 11 segments an image: a scheduler holds one task for each thread.
    assert len(pickle.dumps(shard)) < 256 * 1500


def test_reading_needs_little_more_than_the_file_and_the_records(large_root: Path) -> None:
    layout = CocoLayout.of(large_root, SPLIT)
    size = layout.panoptic_json.stat().st_size
    tracemalloc.start()
    try:
        dataset = read_dataset(layout)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset.records) == IMAGES
    assert kept < 2.5 * size
    assert peak < 5 * size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_work(large_root: Path, tmp_path: Path) -> None:
    found = measured(render_step, large_root, tmp_path / "cache", IMAGES, 2)
    assert found["images"] == IMAGES
    assert found["driver_mb_late"] - found["driver_mb_early"] < 20
    assert found["peak_worker_mb"] < 400
