"""Rendering: the same bytes for any number of workers, interruptions and kills."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from distributed import LocalCluster
from handmade import hashes, noise
from msgspec import structs
from PIL import Image

import panoptic_cache.pipeline.base.files
import panoptic_cache.pipeline.render.driver
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import check_sample
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.cache.verify import verify
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.photo import check_jpeg, encode_jpeg
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.render.driver import RenderResult, render
from panoptic_cache.pipeline.render.dry_run import dry_run
from panoptic_cache.pipeline.render.job import render_image, render_shard
from panoptic_cache.pipeline.render.plan import RenderConfig

CONFIG = RenderConfig(samples_per_shard=4)


def run(dataset: CocoPanoptic, folder: Path, **settings: Any) -> RenderResult:
    config = settings.pop("config", CONFIG)
    return render(dataset, "train", Storage(str(folder)), config, **{"workers": 0, **settings})


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_result_counts_what_was_made(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    result = run(tiny_dataset, tmp_path / "cache")
    tars = list((tmp_path / "cache").glob("*.tar"))
    assert result.to_json() == {
        "images": 12,
        "written": 12,
        "quarantined": 0,
        "shards": 3,
        "bytes": sum(path.stat().st_size for path in tars),
        "seconds": result.seconds,
    }
    assert not result.too_many
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "index.json", "plan.json", "quarantine.jsonl",
        *(f"train-{n:05d}.{suffix}" for n in range(3) for suffix in ("tar", "json")),
    }  # fmt: skip


@pytest.mark.slow
def test_workers_change_no_byte(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, tmp_path: Path
) -> None:
    run(tiny_dataset, tmp_path / "cache", workers=2)
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


def test_a_running_scheduler_changes_no_byte(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, tmp_path: Path
) -> None:
    with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        run(tiny_dataset, tmp_path / "cache", scheduler=cluster.scheduler_address)
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


def test_the_place_of_data_and_cache_changes_no_byte(
    root: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run(read_dataset(CocoLayout.of(root, "train")), tmp_path / "elsewhere")
    assert hashes(tmp_path / "elsewhere") == hashes(tiny_cache)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_run_goes_on(
    tiny_dataset: CocoPanoptic,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    left, work = iter(range(after)), render_shard

    def interrupted(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(panoptic_cache.pipeline.render.driver, "render_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_dataset, tmp_path)
    assert len(list(tmp_path.glob("*.tar"))) == after
    assert not (tmp_path / "index.json").exists()
    before = {name: time for name, time in times(tmp_path).items() if name != "inputs.jsonl"}
    run(tiny_dataset, tmp_path)
    assert hashes(tmp_path) == hashes(tiny_cache)
    assert {k: v for k, v in times(tmp_path).items() if k in before} == before


def test_a_second_run_renders_nothing_again(
    tiny_dataset: CocoPanoptic, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, shards = hashes(cache), {k: v for k, v in times(cache).items() if "train" in k}
    monkeypatch.setattr(
        panoptic_cache.pipeline.render.driver, "render_shard", None
    )  # nobody may call it
    result = run(tiny_dataset, cache)
    assert hashes(cache) == before
    assert {k: v for k, v in times(cache).items() if "train" in k} == shards
    assert (result.written, result.shards) == (12, 3)


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.json", "index.json"])
@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_what_is_missing_or_cut_is_made_again(
    tiny_dataset: CocoPanoptic, cache: Path, name: str, harm: str
) -> None:
    before = hashes(cache)
    if harm == "cut":
        os.truncate(cache / name, 700)
    else:
        (cache / name).unlink()
    run(tiny_dataset, cache)
    assert hashes(cache) == before


def test_a_damaged_sidecar_is_never_vouched_for(tiny_dataset: CocoPanoptic, cache: Path) -> None:
    before, path = hashes(cache), cache / "train-00002.json"
    data = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 12).tolist():
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        run(tiny_dataset, cache)
        assert hashes(cache) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, samples_per_shard=5), "samples_per_shard was 4, now 5"),
        (replace(CONFIG, seed=1), "seed was 0, now 1"),
        (
            replace(CONFIG, fit="squash", size=32),
            "fit was native, now squash; size was None, now 32",
        ),
    ],
)
def test_other_settings_are_refused_and_named(
    tiny_dataset: CocoPanoptic, cache: Path, config: RenderConfig, message: str
) -> None:
    before = hashes(cache)
    with pytest.raises(InputError, match=message) as caught:
        run(tiny_dataset, cache, config=config)
    assert caught.value.code == "plan-changed"
    assert hashes(cache) == before


def test_other_data_are_refused(tiny_root: Path, cache: Path, root: Path) -> None:
    with pytest.raises(InputError, match="split was train, now val"):
        render(read_dataset(CocoLayout.of(tiny_root, "val")), "val", Storage(str(cache)), CONFIG)
    (root / "train" / "000000000003.jpg").unlink()
    with pytest.raises(InputError, match="the set of images on the disk"):
        run(read_dataset(CocoLayout.of(root, "train")), cache, max_bad=1)
    layout = CocoLayout.of(root, "train")
    content = json.loads(layout.panoptic_json.read_bytes())
    content["categories"][0]["name"] = "globe"
    layout.panoptic_json.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the annotation file"):
        run(read_dataset(layout), cache, max_bad=1)


def test_a_photo_that_appears_later_never_mixes_two_plans(root: Path, tmp_path: Path) -> None:
    photo = root / "train" / "000000000003.jpg"
    data = photo.read_bytes()
    photo.unlink()
    run(read_dataset(CocoLayout.of(root, "train")), tmp_path / "cache", max_bad=1)
    (tmp_path / "cache" / "train-00000.tar").unlink()
    photo.write_bytes(data)
    with pytest.raises(InputError) as caught:
        run(read_dataset(CocoLayout.of(root, "train")), tmp_path / "cache", max_bad=1)
    assert caught.value.code == "plan-changed"


def test_a_folder_of_other_tars_is_refused(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    (tmp_path / "holiday.tar").touch()
    with pytest.raises(InputError, match="tars but no plan"):
        run(tiny_dataset, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": "x", "settings": 3}', None])
def test_a_lost_plan_is_written_again_where_the_shards_are_of_it(
    tiny_dataset: CocoPanoptic, cache: Path, content: str | None
) -> None:
    before = hashes(cache)
    (cache / "plan.json").unlink()
    if content is not None:
        (cache / "plan.json").write_text(content)
    assert outlook(tiny_dataset, cache)["done"] == 3
    run(tiny_dataset, cache)
    assert hashes(cache) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": "x", "settings": 3}'])
def test_a_damaged_plan_is_refused_where_a_shard_may_be_of_another(
    tiny_dataset: CocoPanoptic, cache: Path, content: str
) -> None:
    (cache / "plan.json").write_text(content)
    (cache / "train-00001.json").unlink()
    with pytest.raises(InputError, match="plan damaged"):
        run(tiny_dataset, cache)


@pytest.mark.parametrize("split", ["../other", "a/b", ".hidden", ".."])
def test_a_split_that_cannot_name_a_shard_is_refused(
    tiny_dataset: CocoPanoptic, tmp_path: Path, split: str
) -> None:
    with pytest.raises(InputError, match="no leading dot"):
        render(tiny_dataset, split, Storage(str(tmp_path / "cache")), CONFIG, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_the_run_goes_on_later(
    tiny_dataset: CocoPanoptic,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    syncs, sync = itertools.count(), os.fsync

    def full(descriptor: int) -> None:
        if next(syncs) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            run(tiny_dataset, tmp_path)
    run(tiny_dataset, tmp_path)
    assert hashes(tmp_path) == hashes(tiny_cache)


def test_two_runs_never_share_a_folder(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    with Storage(str(tmp_path)).locked(), pytest.raises(InputError, match="another run"):
        run(tiny_dataset, tmp_path)


def test_a_cache_can_lie_elsewhere_than_on_a_disk(
    tiny_dataset: CocoPanoptic, tiny_cache: Path
) -> None:
    storage = Storage("memory://render/cache")
    for _ in range(2):
        render(tiny_dataset, "train", storage, CONFIG, workers=0)
        for path in tiny_cache.iterdir():
            assert storage.read(path.name) == path.read_bytes()
    assert verify(storage, deep=True).ok


@pytest.mark.parametrize(("fit", "shape"), [("squash", (40, 40)), ("longest", None)])
def test_targets_are_computed_after_the_resize(
    tiny_dataset: CocoPanoptic, tmp_path: Path, fit: Any, shape: tuple[int, int] | None
) -> None:
    run(tiny_dataset, tmp_path, config=RenderConfig(fit=fit, size=40, samples_per_shard=7))
    reader = ShardReader(tmp_path)
    for position in range(len(reader)):
        sample = reader.sample(position)
        height, width = sample.original_size
        longest = max(height, width)
        wanted = shape or (round(height * 40 / longest), round(width * 40 / longest))
        assert sample.segment_map.shape == wanted
        check_sample(sample)  # areas, centroids and distances are those of the resized map
    assert verify(Storage(str(tmp_path)), deep=True).ok


def test_shards_hold_every_image_once_in_a_fixed_mix(
    tiny_dataset: CocoPanoptic, tiny_cache: Path
) -> None:
    keys = ShardReader(tiny_cache).keys
    assert sorted(keys) == [record.key for record in tiny_dataset.records]
    assert list(keys) != sorted(keys)


def test_native_samples_are_what_was_annotated(coco_sample: Path, tmp_path: Path) -> None:
    dataset = read_dataset(CocoLayout.of(coco_sample, "val2017"))
    result = render(dataset, "val2017", Storage(str(tmp_path)), CONFIG, workers=0, strict=True)
    assert (result.written, result.quarantined) == (16, 0)
    records, reader = {record.key: record for record in dataset.records}, ShardReader(tmp_path)
    for position, key in enumerate(reader.keys):
        sample, record = reader.sample(position), records[key]
        assert sample.photo == record.photo.read_bytes()
        ids = np.array([0, *(segment.id for segment in sample.segments)])[sample.segment_map]
        np.testing.assert_array_equal(ids, read_ids(record.png))
        assert [(s.id, s.category_id, s.iscrowd, s.area, s.bbox) for s in sample.segments] == [
            (s.id, s.category_id, s.iscrowd, s.area, s.bbox) for s in record.segments
        ]
    assert verify(Storage(str(tmp_path)), deep=True).ok


def test_renaming_ids_changes_no_target(root: Path) -> None:
    layout = CocoLayout.of(root, "val")
    dataset = read_dataset(layout)
    categories = {category.id: category for category in dataset.categories}
    rng = np.random.default_rng(0)
    for record in dataset.records:
        names = rng.choice(2**24 - 1, len(record.segments), replace=False) + 1
        rename = {s.id: int(name) for s, name in zip(record.segments, names, strict=True)}
        ids = np.vectorize(lambda i: rename.get(i, 0))(read_ids(record.png))  # noqa: B023
        bgr = np.stack([ids >> 16 & 255, ids >> 8 & 255, ids & 255], -1).astype(np.uint8)
        renamed = replace(
            record,
            png=record.png.with_suffix(".renamed.png"),
            segments=tuple(structs.replace(s, id=rename[s.id]) for s in record.segments),
        )
        cv2.imwrite(str(renamed.png), bgr)
        one, other = (
            render_image(each, CONFIG, categories, Counter())[0] for each in (record, renamed)
        )
        for name in ("segment_map", "eds", "void"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert [replace(s, id=rename[s.id]) for s in one.segments] == list(other.segments)


@pytest.mark.parametrize(("which", "scheme"), [("photo", ""), ("png", ""), ("photo", "local://")])
def test_what_changed_before_a_run_goes_on_is_rendered_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, scheme: str
) -> None:
    # `local://` is a local disk that is reached as any remote place is.
    storage = Storage(f"{scheme}{tmp_path / 'cache'}")
    dataset = read_dataset(CocoLayout.of(root, "train"))
    left, work = iter(range(2)), render_shard

    def interrupted(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(panoptic_cache.pipeline.render.driver, "render_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(dataset, "train", storage, CONFIG, workers=0)
    with (tmp_path / "cache" / "inputs.jsonl").open("a") as file:
        file.write('{"shard": "train-000')  # as a kill leaves it
    key = json.loads((tmp_path / "cache" / "train-00001.json").read_text())["samples"][0]["key"]
    record = next(record for record in dataset.records if record.key == key)
    path = getattr(record, which)
    with Image.open(path) as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=95)
    before = times(tmp_path / "cache")
    render(dataset, "train", storage, CONFIG, workers=0)
    run(dataset, tmp_path / "wanted")
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "wanted")
    after = times(tmp_path / "cache")
    assert after["train-00000.tar"] == before["train-00000.tar"]
    assert after["train-00001.tar"] != before["train-00001.tar"]


def test_a_finished_cache_needs_no_right_to_write(
    tiny_dataset: CocoPanoptic,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write", "remove", "create", "locked"):
        monkeypatch.setattr(Storage, name, refuse)
    with caplog.at_level("INFO", "panoptic_cache"):
        assert run(tiny_dataset, cache).written == 12
    assert any("nothing to do" in line for line in caplog.messages)


def test_notes_that_a_kill_left_beside_the_index_go(
    tiny_dataset: CocoPanoptic, cache: Path
) -> None:
    before = hashes(cache)
    (cache / "inputs.jsonl").touch()
    run(tiny_dataset, cache)
    assert hashes(cache) == before


class Share:
    """A share whose reads fail: of the files that are named, from then on, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: float, *names: str) -> None:
        self.failures, self.names, opened = failures, names, os.open
        monkeypatch.setattr(panoptic_cache.pipeline.base.files, "SHARE_PAUSES", (0, 0, 0))

        def open_(path: Any, *arguments: Any, **settings: Any) -> int:
            if str(path).endswith(self.names) and self.failures > 0:
                self.failures -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return opened(path, *arguments, **settings)

        monkeypatch.setattr(os, "open", open_)


def test_a_share_that_fails_in_passing_costs_nothing(
    root: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_dataset(CocoLayout.of(root, "train"))
    Share(monkeypatch, 3, "000000000003.jpg")
    run(dataset, tmp_path / "cache")
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


@pytest.mark.parametrize("suffixes", [(".jpg",), (".jpg", ".png")])
def test_an_outage_ends_the_run_and_costs_no_image(
    root: Path,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffixes: tuple[str, ...],
) -> None:
    dataset = read_dataset(CocoLayout.of(root, "train"))
    with monkeypatch.context() as patch:
        Share(patch, float("inf"), *suffixes)
        with pytest.raises(InputError) as caught:
            run(dataset, tmp_path / "cache", max_bad=12)
    assert caught.value.code == "input-failing"
    run(dataset, tmp_path / "cache", max_bad=12)
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


def test_one_bad_sector_costs_one_image(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_dataset(CocoLayout.of(root, "train"))
    Share(monkeypatch, float("inf"), "000000000003.jpg")
    assert run(dataset, tmp_path / "cache", max_bad=1).quarantined == 1


def test_what_was_left_out_is_tried_again_when_asked(root: Path, tmp_path: Path) -> None:
    photo = root / "train" / "000000000003.jpg"
    data = photo.read_bytes()
    dataset = read_dataset(CocoLayout.of(root, "train"))
    run(dataset, tmp_path / "wanted")
    photo.write_bytes(data[:-100])
    assert run(dataset, tmp_path / "cache").quarantined == 1
    before = times(tmp_path / "cache")
    photo.write_bytes(data)
    assert run(dataset, tmp_path / "cache").quarantined == 1  # a finished shard stays as it is
    result = run(dataset, tmp_path / "cache", retry=True)
    assert (result.written, result.quarantined) == (12, 0)
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "wanted")
    after = times(tmp_path / "cache")
    assert sum(after[name] != before[name] for name in before if name.endswith(".tar")) == 1


def test_a_cache_that_is_being_mended_is_not_finished(
    tiny_dataset: CocoPanoptic, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "train-00001.tar").unlink()
    monkeypatch.setattr(panoptic_cache.pipeline.render.driver, "render_shard", None)
    with pytest.raises(TypeError):
        run(tiny_dataset, cache)
    assert not (cache / "index.json").exists()


def test_strict_names_the_image(root: Path, tmp_path: Path) -> None:
    layout = CocoLayout.of(root, "train")
    content = json.loads(layout.panoptic_json.read_bytes())
    content["annotations"][4]["segments_info"][0]["area"] += 1
    layout.panoptic_json.write_text(json.dumps(content))
    name = content["annotations"][4]["image_id"]
    with pytest.raises(InputError, match=f"image {name}: area-wrong in 1 places"):
        run(read_dataset(layout), tmp_path / "a", strict=True)
    (root / "train" / "000000000003.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"000000000003\.jpg"):
        run(read_dataset(layout), tmp_path / "b", strict=True)


@pytest.mark.parametrize("progressive", [False, True])
def test_the_quick_check_of_a_photo_is_as_strict_as_decoding_it(progressive: bool) -> None:
    rng = np.random.default_rng(0)
    base = cv2.resize(noise((12, 16)), (160, 120), interpolation=cv2.INTER_CUBIC)
    settings = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_RST_INTERVAL, 4]
    good = bytes(cv2.imencode(".jpg", base, settings)[1])
    found: Counter[bool] = Counter()
    for number in range(400):
        data = bytearray(good)
        place = int(rng.integers(2, len(good)))
        if number % 4 == 0:
            del data[place:]
        elif number % 4 == 1:
            data[place] ^= 1 << int(rng.integers(8))
        elif number % 4 == 2:
            del data[place : place + int(rng.integers(1, 30))]
        else:
            data[place : place + 20] = bytes(20)
        said = []
        for check in (check_jpeg, lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB")):
            try:
                check(bytes(data))
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1], number
        found[bool(said[0])] += 1
    assert min(found.values()) > 20


def test_converted_photos_are_resized_once(root: Path) -> None:
    dataset = read_dataset(CocoLayout.of(root, "val"))
    record = dataset.records[0]
    gray = cv2.imread(str(record.photo), cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    cv2.imwrite(str(record.photo), gray)
    categories = {category.id: category for category in dataset.categories}
    config = RenderConfig(fit="squash", size=40)
    (sample,) = render_image(record, config, categories, Counter())
    whole = simplejpeg.decode_jpeg(record.photo.read_bytes(), colorspace="RGB")
    wanted = encode_jpeg(cv2.resize(whole, (40, 40), interpolation=cv2.INTER_AREA), 95)
    assert sample.photo == wanted


def outlook(dataset: CocoPanoptic, folder: Path, config: RenderConfig = CONFIG) -> dict[str, Any]:
    return dry_run(dataset, "train", Storage(str(folder)), config, max_bad=0)


def test_a_dry_run_tells_what_the_run_then_does(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    found = outlook(tiny_dataset, folder)
    assert not (tmp_path / "deep").exists()
    result = run(tiny_dataset, folder)
    assert (found["images"], found["quarantined"], found["too_many"]) == (12, 0, False)
    assert (found["shards"], found["done"]) == (result.shards, 0)
    assert found["bytes"] == pytest.approx(result.bytes, rel=0.4)
    assert found["seconds"] > 0
    assert found["free_bytes"] > 0
    (folder / "train-00001.tar").unlink()
    assert outlook(tiny_dataset, folder)["done"] == 2
    with pytest.raises(InputError, match="samples_per_shard was 4, now 5"):
        outlook(tiny_dataset, folder, replace(CONFIG, samples_per_shard=5))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def small(path: Path) -> None:
    picture = cv2.imread(str(path))
    assert picture is not None
    cv2.imwrite(str(path), picture[2:])


@pytest.mark.parametrize("folder", ["train", "annotations/panoptic_train"])
@pytest.mark.parametrize("harm", [Path.unlink, cut, small])
def test_a_dry_run_finds_what_the_run_will_find(
    root: Path, tmp_path: Path, folder: str, harm: Any
) -> None:
    harm(sorted((root / folder).iterdir())[5])
    dataset = read_dataset(CocoLayout.of(root, "train"))
    found = outlook(dataset, tmp_path / "cache")
    assert (found["images"], found["quarantined"], found["too_many"]) == (12, 1, True)
    assert run(dataset, tmp_path / "cache", max_bad=1).quarantined == 1
