"""Several caches in one run: how many samples come from each, their order, what is refused."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from short_runs import lines_of, make_config, same_run, write_config

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import encode_index, read_index
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.train.caches import (
    Mix,
    class_weights,
    follow_tiles,
    mix_caches,
    open_caches,
)
from panoptic_cache.train.config import CachePart, DataConfig, LossConfig, TrainConfig
from panoptic_cache.train.data import Share, epoch_places, step_places
from panoptic_cache.train.loader import iterate, make_loader
from panoptic_cache.train.loop import train
from panoptic_cache.train.stages import load_stages

pytestmark = pytest.mark.usefixtures("one_thread_without_gpu")


@pytest.fixture(scope="module")
def other_cache(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four other images than those of `tiny_cache`, in two shards. Read only."""
    folder = tmp_path_factory.mktemp("other") / "cache"
    dataset = read_dataset(CocoLayout.of(tiny_root, "val"))
    render(dataset, "val", Storage(str(folder)), RenderConfig(samples_per_shard=2), workers=0)
    return folder


def mixed(*parts: tuple[Path, float | None], reader: str = "indexed") -> DataConfig:
    caches = tuple(CachePart(str(path), ratio) for path, ratio in parts)
    values = DataConfig(caches=caches, size=28, batch=4, micro_batch=2, workers=0)
    return replace(values, reader="stream" if reader == "stream" else "indexed")


# The order


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**32 - 2**16))
def test_one_cache_keeps_its_order(samples: int, epoch: int, seed: int) -> None:
    """NumPy's permutation by seed and epoch, as runs of one cache have always had it."""
    wanted = np.random.default_rng([seed, epoch]).permutation(samples)
    for mix in (Mix((samples,), (samples,)), mix_caches(DataConfig(cache="a"), [samples])):
        places = epoch_places(seed, epoch, mix)
        assert places[:, 0].tolist() == [epoch] * samples
        assert places[:, 1].tolist() == wanted.tolist()


sized = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 10)), min_size=2, max_size=4)


@settings(deadline=None)
@given(sized, st.integers(1, 8), st.integers(0, 99))
def test_each_cache_has_its_part_of_an_epoch_and_all_its_samples_before_any_again(
    caches: list[tuple[int, float]], epochs: int, seed: int
) -> None:
    sizes = [size for size, _ in caches]
    config = DataConfig(caches=tuple(CachePart("a", ratio) for _, ratio in caches))
    mix = mix_caches(config, sizes)
    total = sum(ratio for _, ratio in caches)
    assert sum(mix.parts) == sum(sizes)
    for part, (_, ratio) in zip(mix.parts, caches, strict=True):
        assert abs(part - sum(sizes) * ratio / total) <= 1
    seen = [places for epoch in range(epochs) for places in epoch_places(seed, epoch, mix).tolist()]
    start = 0
    for size, part in zip(sizes, mix.parts, strict=True):
        own = [(number, at) for number, at in seen if start <= at < start + size]
        assert len(own) == epochs * part
        rounds = [number for number, _ in sorted(own)]
        assert rounds == [k // size for k in range(epochs * part)]
        assert len({*own}) == len(own)
        start += size


def test_by_default_caches_are_joined() -> None:
    config = DataConfig(caches=(CachePart("a"), CachePart("b")))
    assert mix_caches(config, [5, 7]).parts == (5, 7)
    places = step_places(0, mix_caches(config, [5, 7]), 12, 3)
    assert sorted(places) == [(3, position) for position in range(12)]
    halves = DataConfig(caches=(CachePart("a", 1), CachePart("b", 3)))
    assert mix_caches(halves, [5, 7]) == ((5, 7), (3, 9))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_parts_on_any_number_of_readers(
    tiny_cache: Path, other_cache: Path, workers: int
) -> None:
    config = replace(mixed((tiny_cache, 1), (other_cache, 3)), workers=workers)
    caches = open_caches(config)
    assert (caches.samples, caches.mix.parts) == (16, (4, 12))
    seen = Counter[str]()
    for rank in range(2):
        share = Share(seed=3, steps=range(12), rank=rank, world=2)
        batches = iterate(make_loader(config, caches, share))
        seen.update(key for batch in batches for key in batch.keys)
    first, second = (ShardReader(path).keys for path in (tiny_cache, other_cache))
    # Three epochs of 16: 12 samples of the first cache, once each; 36 of the other one's four.
    assert seen == {**dict.fromkeys(first, 1), **dict.fromkeys(second, 9)}


def test_readers_share_the_files_that_a_process_may_open(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards each; four readers of eight files keep two of them open."""
    monkeypatch.setattr("panoptic_cache.pipeline.cache.shards.open_files", lambda: 8)
    reader = ShardReader(tiny_cache, 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for position in range(len(reader)):
        reader.members(position)
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 2


def test_streams_are_mixed_by_their_parts(tiny_cache: Path, other_cache: Path) -> None:
    config = mixed((tiny_cache, 1), (other_cache, 3), reader="stream")
    config = replace(config, augment=False)
    caches, share = open_caches(config), Share(seed=3, steps=range(100))
    second = {*ShardReader(other_cache).keys}
    keys = [key for batch in make_loader(config, caches, share) for key in batch.keys]
    assert 260 < sum(key in second for key in keys) < 340  # 300; four standard deviations are 35
    counts = Counter(keys)
    assert len(counts) == 16
    assert max(counts[key] for key in second) - min(counts[key] for key in second) <= 1
    again = islice(make_loader(config, caches, share), 5)
    assert [key for batch in again for key in batch.keys] == keys[:10]
    with pytest.raises(InputError, match=r"2 shards for 3 readers.*data\.workers"):
        make_loader(replace(config, workers=3), caches, share)


# A run


def test_a_run_of_two_caches_resumes_bit_for_bit(
    tiny_cache: Path, other_cache: Path, tmp_path: Path
) -> None:
    data = mixed((tiny_cache, 1), (other_cache, 3))
    config = replace(make_config(tiny_cache, tmp_path / "whole", keep=9), data=data)
    train(config)
    assert [line["epoch"] for line in lines_of(tmp_path / "whole")][:4] == [0.25, 0.5, 0.75, 1.0]
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"rest/checkpoints/step_{step:07d}")
    (again,) = load_stages(tmp_path / "rest/config.toml", [f"out={tmp_path / 'rest'}"])
    assert again == replace(config, out=str(tmp_path / "rest"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(again, resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "rest")
    other = mixed((tiny_cache, 1), (other_cache, 2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match="the cache is not the one this run began with"):
        train(replace(again, data=other), resume=True)


def test_a_run_that_was_moved_finds_all_its_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/first"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs/cache").mkdir()
    paths = 'caches = [{path = "runs/cache"}, {path = "s3://bucket/cache"}]'
    (run / "config.toml").write_text(f'out = "runs/first"\n[data]\n{paths}\n')
    monkeypatch.chdir(run)
    (config,) = load_stages(run / "config.toml")
    assert config.data.paths == (str(tmp_path / "runs/cache"), "s3://bucket/cache")


# What is refused


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ('[{path="{tiny}", ration=2}]', r"data: caches: unknown key ration \(did you mean ratio\?"),
        ('[{path="{tiny}", ratio=2}, {path="{tiny}"}]', "all data.caches or none need a ratio"),
        ('[{path="{tiny}", ratio=0}]', r"data\.caches\[0\]\.ratio: Expected `float` > 0"),
        ('[{path="{tiny}"}, {path="nowhere"}]', "nowhere/index.json: no index"),
        ('[{path="{tiny}", ratio=1e5}, {path="{tiny}", ratio=1}]', "not one sample of an epoch"),
        ("[3]", r"data\.caches\[0\]: Expected `object`, got `int`"),
    ],
)
def test_wrong_caches_are_one_line(
    run: Run, tiny_cache: Path, tmp_path: Path, caches: str, message: str
) -> None:
    config = make_config(Path(), tmp_path / "run")
    file = write_config(replace(config, data=replace(config.data, cache="")), tmp_path / "run.toml")
    value = caches.replace("{tiny}", str(tiny_cache))
    code, _, line = run("train", file, "--set", f"data.caches={value}")
    assert code == 1
    assert "\n" not in line
    assert re.search(message, line), line


def test_a_cache_beside_others_is_refused() -> None:
    with pytest.raises(InputError, match=r"name data\.cache or data\.caches, not both"):
        TrainConfig(data=DataConfig(cache="a", caches=(CachePart("b"),)))


def test_other_categories_are_refused_by_the_first_that_differs(
    tiny_cache: Path, cache: Path
) -> None:
    index = read_index(Storage(str(cache)))
    first, *rest = index.categories
    config = mixed((tiny_cache, None), (cache, None))

    def write(*categories: object) -> None:
        changed = msgspec.structs.replace(index, categories=categories)
        (cache / "index.json").write_bytes(encode_index(changed))

    write(replace(first, id=99), *rest)  # an id is a matter of the annotation file
    assert open_caches(config).categories == index.categories
    for changed in (replace(first, name="x"), replace(first, isthing=not first.isthing)):
        write(changed, *rest)
        with pytest.raises(InputError, match=r"label 0 is .* in .* it is ") as caught:
            open_caches(config)
        assert first.name in str(caught.value)
        assert str(caught.value).startswith(str(cache))
    write(first, *rest[:-1])
    with pytest.raises(InputError, match=rf"label {len(rest)} is None; in .* it is \('"):
        open_caches(config)


def test_caches_of_different_tiles_need_a_size(tiny_cache: Path, cache: Path) -> None:
    index = read_index(Storage(str(cache)))
    tiles = msgspec.structs.replace(index, settings={**index.settings, "tile": 48})
    config = TrainConfig(data=mixed((tiny_cache, None), (cache, None)))
    with pytest.raises(InputError, match=r"tiles of 0, 48 px.*data\.tile=48"):
        follow_tiles(config, [index, tiles])
    named = replace(config, data=replace(config.data, tile=32))
    assert follow_tiles(named, [index, tiles]).data.tile == 32


# Weights of categories


def test_rare_categories_weigh_by_the_root_of_their_pixels(
    tiny_cache: Path, other_cache: Path
) -> None:
    """Counted pixel by pixel on the maps; the first cache fills a quarter of an epoch."""
    data = mixed((tiny_cache, 1), (other_cache, 3))
    caches = open_caches(data)
    pixels = [0.0] * len(caches.categories)
    for path, factor in ((tiny_cache, 4 / 12), (other_cache, 12 / 4)):
        reader = ShardReader(path)
        for position in range(len(reader)):
            sample = reader.sample(position)
            for row in sample.segment_map.flat:
                if row:
                    pixels[sample.segments[row - 1].label] += factor
    loss = LossConfig(class_weights="inverse_sqrt")
    weights = class_weights(TrainConfig(data=data, loss=loss), caches)
    assert weights is not None
    total, present = sum(pixels), [n for n, count in enumerate(pixels) if count]
    for one in present:
        assert weights[one] * pixels[one] ** 0.5 == pytest.approx(
            weights[present[0]] * pixels[present[0]] ** 0.5
        )
    assert sum(w * n for w, n in zip(weights, pixels, strict=True)) == pytest.approx(total)
    assert all(weights[n] == 1 for n in range(len(pixels)) if n not in present)
    plain = class_weights(TrainConfig(data=data), caches)
    assert plain is None


def test_a_table_of_weights_goes_by_name(tiny_cache: Path) -> None:
    data = DataConfig(cache=str(tiny_cache))
    caches = open_caches(data)
    names = [category.name for category in caches.categories]
    loss = LossConfig(class_weights={names[1]: 3.0})
    weights = class_weights(TrainConfig(data=data, loss=loss), caches)
    assert weights == [1.0, 3.0, *[1.0] * (len(names) - 2)]


def test_weights_change_the_training_and_stay_with_the_run(
    run: Run, tiny_cache: Path, tmp_path: Path
) -> None:
    name = open_caches(DataConfig(cache=str(tiny_cache))).categories[0].name
    base = make_config(tiny_cache, tmp_path / "plain", steps=3)
    losses = {}
    tables: dict[str, dict[str, float]] = {"one": {name: 1.0}, "zero": {name: 0.0}}
    for out in ("plain", "one", "zero"):
        loss = replace(base.loss, class_weights=tables.get(out, "none"))
        AcceleratorState._reset_state(reset_partial_state=True)
        config = replace(base, out=str(tmp_path / out), loss=loss)
        train(config)
        assert load_stages(tmp_path / out / "config.toml") == [config]
        lines = lines_of(tmp_path / out)
        losses[out] = [line["pixel"] for line in lines if line["task"] == "semantic"]
    assert losses["plain"] == losses["one"]
    assert losses["plain"][0] > losses["zero"][0]
    file = write_config(base, tmp_path / "run.toml")
    out = f"out={tmp_path / 'one'}"
    setting = f"loss.class_weights={{{name}=2}}"
    code, _, line = run("train", file, "--resume", "--set", out, "--set", setting)
    assert code == 1
    assert f"loss.class_weights.{name} was 1.0, now 2.0" in line
    code, _, line = run("train", file, "--set", "loss.class_weights=inverse")
    assert line.endswith("Invalid enum value 'inverse' (one of none, inverse_sqrt)")
    setting = f"loss.class_weights={{{name}x=2}}"
    code, _, line = run("train", file, "--set", f"out={tmp_path / 'new'}", "--set", setting)
    assert (code, line) == (
        1,
        f"loss.class_weights: no category {name}x (did you mean {name}?)",
    )
