"""Looks at a run: held-out samples, pictures, and that none of it touches the run."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import short_runs
import torch
from accelerate.state import AcceleratorState
from short_runs import lines_of, untimed, weights_of

from panoptic_cache.evaluate.held_out import panoptic_quality
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.pictures import Picture, Tile, sheet, shortened
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.train.augment import Augmentation, make_item
from panoptic_cache.train.checkpoint import TrainState
from panoptic_cache.train.config import (
    DataConfig,
    TrainConfig,
    ValidationConfig,
)
from panoptic_cache.train.data import collate
from panoptic_cache.train.encoding import PositionalCode, grid_cells
from panoptic_cache.train.loop import train
from panoptic_cache.train.losses import gather_rows
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.restore import load_model
from panoptic_cache.train.validation import (
    code_hits,
    draw_heads,
    find_metric,
    label_hits,
    open_held_out,
)

seen: list[tuple[bool, int, list[str]]] = []


def spy(model: PanopticModel, state: TrainState, samples: Iterable[Sample]) -> Mapping[str, float]:
    """A metric that notes what it was given."""
    seen.append((model.training, state.step, [sample.key for sample in samples]))
    return {"spied": 1.0}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def held_out_cache(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    dataset = read_dataset(CocoLayout.of(tiny_root, "val"))
    render(dataset, "val", Storage(str(folder)), RenderConfig(), workers=0)
    return folder


def make_config(cache: Path, out: Path, **settings: Any) -> TrainConfig:
    """Five steps that are saved once and looked at as the test says."""
    plain: dict[str, Any] = {"steps": 5, "checkpoint_every": 100, "pictures_every": 0}
    return short_runs.make_config(cache, out, **(plain | settings))


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in untimed(run) if "validation" not in line]


def test_watching_changes_nothing(tiny_cache: Path, held_out_cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(make_config(tiny_cache, tmp_path / "plain"))
    AcceleratorState._reset_state(reset_partial_state=True)
    seen.clear()
    looks = ValidationConfig(
        cache=str(held_out_cache), every=2, samples=3, metric=f"{__name__}:spy"
    )
    watched = make_config(
        tiny_cache,
        tmp_path / "watched",
        validation=looks,
        pictures_every=3,
        trackers=("tensorboard",),
    )
    train(watched, trust_config=True)
    plain, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "watched")
    assert all(torch.equal(value, other[name]) for name, value in plain.items())
    assert steps_of(tmp_path / "plain") == steps_of(tmp_path / "watched")

    found = [line for line in lines_of(tmp_path / "watched") if "validation" in line]
    assert [line["step"] for line in found] == [2, 4, 5]
    for line in found:
        values = line["validation"]
        assert values.keys() == {
            *("instance_loss", "semantic_loss", "semantic_accuracy"),
            *("code_accuracy", "void_accuracy", "spied"),
        }
        assert all(0 <= value <= 1 for name, value in values.items() if "accuracy" in name)
    assert [(training, step) for training, step, _ in seen] == [(False, s) for s in (2, 4, 5)]
    assert {len(keys) for _, _, keys in seen} == {3}
    pictures = tmp_path / "watched/pictures"
    assert [path.name for path in pictures.iterdir()] == ["step_0000003.png"]

    module = "tensorboard.backend.event_processing.event_accumulator"
    (events,) = (tmp_path / "watched").rglob("events.out.tfevents.*")
    tags = importlib.import_module(module).EventAccumulator(str(events.parent)).Reload().Tags()
    assert {"instance/loss", "semantic/loss", "validation/semantic_accuracy"} <= {*tags["scalars"]}
    assert tags["images"] == ["prediction"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pq_of_held_out_samples(
    tiny_cache: Path,
    held_out_cache: Path,
    tmp_path: Path,
    precision: Literal["fp32", "bf16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a GPU the decoder runs in the thread that runs the network: with whatever is on there.
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    name = "panoptic_cache.evaluate.held_out:panoptic_quality"
    looks = ValidationConfig(cache=str(held_out_cache), every=5, metric=name)
    train(make_config(tiny_cache, tmp_path, validation=looks, ema=0.9, precision=precision))
    (line,) = (line for line in lines_of(tmp_path) if "validation" in line)
    assert 0 <= line["validation"]["pq"] <= 1
    # The very same afterwards, from the checkpoint: it was the average that was measured.
    reader = ShardReader(held_out_cache)
    samples = [reader.sample(position) for position in range(len(reader))]
    model, state = load_model(tmp_path)
    with torch.no_grad():
        again = panoptic_quality(model, state, samples)
    assert again.items() <= line["validation"].items()


def test_a_look_that_a_kill_took_comes_with_resuming(
    tiny_cache: Path, held_out_cache: Path, tmp_path: Path
) -> None:
    """The checkpoint is written before it."""
    looks = ValidationConfig(cache=str(held_out_cache), every=2, samples=3)
    config = make_config(tiny_cache, tmp_path, validation=looks, checkpoint_every=2)
    train(config)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    lines = whole.splitlines()
    assert "validation" in lines[-1]
    metrics.write_text("".join(f"{line}\n" for line in lines[:-1]))
    for _ in range(2):  # and comes once
        AcceleratorState._reset_state(reset_partial_state=True)
        train(config, resume=True)
        assert metrics.read_text() == whole


def test_accuracies_of_perfect_and_of_empty_predictions(held_out_cache: Path) -> None:
    reader = ShardReader(held_out_cache)
    config = DataConfig(size=56)
    batch = collate([make_item(reader.sample(p), config, Augmentation()) for p in range(4)])
    # Two harmonics: the finest period of four would be as short as the 11 cells of 56 px.
    encoding, cells = PositionalCode(2), grid_cells(56)
    code = gather_rows(encoding.encode(batch.centroid, batch.instance), batch.segment_map)
    near, things, void, rest = code_hits(code, batch, encoding, cells)
    assert [int(near), int(void)] == [int(things), int(rest)]
    assert min(things, rest) > 0
    near, _, void, _ = code_hits(torch.zeros_like(code), batch, encoding, cells)
    assert [int(near), int(void)] == [0, int(rest)]
    turned = code_hits(code.roll(28, -1), batch, encoding, cells)
    assert turned[0] < things / 2
    label = batch.label.gather(1, batch.segment_map.flatten(1).long()).view(batch.segment_map.shape)
    logits = torch.nn.functional.one_hot(label.clamp_min(0)).permute(0, 3, 1, 2).float()
    right, counted = label_hits(logits, batch)
    assert right == counted == (label >= 0).sum()


def test_a_picture_shows_five_maps_a_sample(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(tiny_cache)
    config = DataConfig(size=28)
    batch = collate([make_item(reader.sample(p), config, Augmentation()) for p in range(6)])
    categories = reader.index.categories
    model = PanopticModel(make_config(tiny_cache, Path("x")).model, 16, len(categories))
    rows: list[Sequence[Tile]] = []

    def noting(found: list[list[Tile]]) -> Picture:
        rows.extend(found)
        return sheet(found)

    monkeypatch.setattr("panoptic_cache.train.validation.sheet", noting)
    picture = draw_heads(model, batch, PositionalCode(), categories)
    assert all(shortened(name, tile.shape[1], 15) == name for row in rows for name, tile in row)
    assert [int(row[0][0]) for row in rows] == [int(key) for key in batch.keys[:4]]
    assert picture.ndim == 3
    assert picture.shape[0] > 4 * 28
    assert picture.shape[1] > 5 * 28
    assert not model.training


@pytest.mark.parametrize("name", ["nowhere.at:all", "evaluate.held_out:nothing", "json:"])
def test_a_metric_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=r"validation\.metric"):
        find_metric(name)


def test_validation_on_other_categories_is_refused(held_out_cache: Path, tmp_path: Path) -> None:
    looks = ValidationConfig(cache=str(held_out_cache), every=1)
    config = make_config(held_out_cache, tmp_path, validation=looks)
    categories = ShardReader(held_out_cache).index.categories
    assert open_held_out(config, categories) is not None
    with pytest.raises(InputError, match="its categories differ"):
        open_held_out(config, categories[1:])
    remote = replace(config, validation=replace(looks, cache="s3://bucket/val"))
    with pytest.raises(InputError, match=r"needs a local cache"):
        open_held_out(remote, categories)


def test_only_modules_of_this_package_are_imported_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text("open('harm', 'w').close()\ndef metric(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"stranger is no module .*add --trust-config"):
        find_metric("stranger:metric")
    assert not Path("harm").exists()
    assert callable(find_metric("stranger:metric", trust=True))
    # As runs of version 0.1 name it.
    assert find_metric("evaluate.held_out:panoptic_quality") is panoptic_quality
