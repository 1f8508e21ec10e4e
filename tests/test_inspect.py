"""Inspection of caches, tars and samples, and the sheet of a sample."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.inspect import describe, find_sample, readable, summary_table
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.photo import decode_photo, fitted_size
from panoptic_cache.pipeline.pictures import TILE, resized, sample_sheet, segment_colours
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def test_cache_is_described_by_its_index(tiny_cache: Path, tiny_dataset: CocoPanoptic) -> None:
    summary = json.loads(json.dumps(describe(str(tiny_cache))))
    assert (summary["split"], summary["shards"], summary["samples"]) == ("train", 3, 12)
    assert summary["bytes"] == sum(tar.stat().st_size for tar in tars(tiny_cache))
    categories = len(tiny_dataset.categories)
    assert summary["categories"] == summary["things"] + summary["stuff"] == categories
    assert summary["settings"]["samples_per_shard"] == 4
    assert ["split", "train"] in [line.split() for line in summary_table(summary).splitlines()]


def test_shard_is_described_by_itself(tiny_cache: Path) -> None:
    reader = ShardReader(tiny_cache)
    samples = {reader.keys[i]: reader.sample(i) for i in range(len(reader))}
    rows: list[dict[str, Any]] = []
    for tar in tars(tiny_cache):
        summary = describe(str(tar))
        assert (summary["problem"], summary["bytes"]) == ("", tar.stat().st_size)
        lines = [line.split() for line in summary_table(summary).splitlines()]
        assert [line[0] for line in lines] == ["key", *(row["key"] for row in summary["samples"])]
        assert {len(line) for line in lines} == {8}
        rows += summary["samples"]
    assert [row["key"] for row in rows] == list(samples)
    for row in rows:
        sample = samples[row["key"]]
        assert (row["height"], row["width"]) == sample.segment_map.shape
        assert row["segments"] == len(sample.segments)
        assert row["segments"] == row["things"] + row["stuff"] + row["crowd"]
        assert row["things"] == sum(segment.centroid is not None for segment in sample.segments)
        assert row["crowd"] == sum(segment.iscrowd for segment in sample.segments)


def test_shard_without_its_cache(tiny_cache: Path, tmp_path: Path) -> None:
    tar = tmp_path / "alone.tar"
    tar.write_bytes(tars(tiny_cache)[0].read_bytes())
    assert describe(str(tar))["problem"] == "no sidecar"
    sample, categories = find_sample(str(tar))
    assert categories == ()
    assert sample_sheet(sample).dtype == np.uint8
    tar.with_suffix(".json").write_text("{}")
    assert "not a sidecar" in describe(str(tar))["problem"]


def test_stale_sidecar_is_a_problem(cache: Path) -> None:
    first, second, _ = tars(cache)
    second.write_bytes(first.read_bytes())
    assert "another tar" in describe(str(second))["problem"]


def test_sample_is_found_in_cache_and_tar(tiny_cache: Path) -> None:
    reader = ShardReader(tiny_cache)
    last = reader.sample(len(reader) - 1)
    spellings = (last.key, last.key.lstrip("0"), last.file_name)
    for place in (tiny_cache, tars(tiny_cache)[-1]):
        for key in spellings:
            found, categories = find_sample(str(place), key)
            assert found.photo == last.photo
            assert categories == reader.index.categories
    assert find_sample(str(tiny_cache))[0].key == reader.keys[0]


def test_unknown_key_names_some_that_exist(tiny_cache: Path) -> None:
    known = ShardReader(tiny_cache).keys
    for place, count in ((tiny_cache, 12), (tars(tiny_cache)[0], 4)):
        with pytest.raises(InputError, match=f"no sample 777.*{count} samples") as caught:
            find_sample(str(place), "777")
        assert ", ".join(known[:3]) in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "absent.tar", "photo.jpg", "", "empty.tar"])
def test_what_is_neither_cache_nor_tar(tmp_path: Path, name: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8 not a tar" * 99)
    (tmp_path / "empty.tar").touch()
    place = str(tmp_path / name)
    with pytest.raises(InputError) as caught:
        describe(place)
    assert caught.value.remedy
    with pytest.raises(InputError) as caught:
        find_sample(place)
    assert caught.value.remedy


def test_cut_tar_is_told(cache: Path) -> None:
    tar = tars(cache)[0]
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(InputError, match="not a readable tar"):
        describe(str(tar))
    with pytest.raises(InputError, match="bytes, the index says"):
        find_sample(str(cache))


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "a.json"
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE_TARS = {
    "link": header("a.json", kind=tarfile.LNKTYPE),
    "link to itself": header("a.json", kind=tarfile.SYMTYPE) * 3,
    "device": header("a.json", kind=tarfile.CHRTYPE),
    "sparse": header("a.json", 512, tarfile.GNUTYPE_SPARSE) + bytes(512),
    "huge": header("a.json", 1 << 62) + bytes(512),
    "negative": header("a.json", -1 << 40) + bytes(512),
    "huge pax": header("pax", 1 << 62, tarfile.XHDTYPE) + bytes(512),
    "odd pax": header("pax", 20, tarfile.XHDTYPE) + b"99 size=-7\n".ljust(512, b"\0"),
    "many pax": (header("pax", 8, tarfile.XHDTYPE) + b"8 a=b\n".ljust(512, b"\0")) * 5_000,
    "a way out": header("../../a.json", 512) + b"{}".ljust(512),
    "no sample": header("README", 512) + b"{}".ljust(512),
    "no table": header("a.json", 4) + b"null".ljust(512, b"\0"),
    "cut": header("a.json", 5_000) + bytes(512),
}


@pytest.mark.parametrize("end", [b"", bytes(1024)])
@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_a_hostile_tar_is_one_line(tmp_path: Path, name: str, end: bytes) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(HOSTILE_TARS[name] + end)
    for look in (describe, find_sample):
        if look is describe and end and name in {"odd pax", "many pax"}:
            assert describe(str(tar))["samples"] == []  # it holds no file
            continue
        with pytest.raises(InputError) as caught:
            look(str(tar))
        assert len(str(caught.value).splitlines()) == 1


def test_a_tar_that_other_programs_made_is_read(tiny_cache: Path, tmp_path: Path) -> None:
    with tarfile.open(tars(tiny_cache)[0]) as shard:
        shard.extractall(tmp_path / "files", filter="data")
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as made:
            made.add(tmp_path / "files", ".")  # with folders and times
        rows = describe(str(tmp_path / f"{number}.tar"))["samples"]
        assert sorted(row["key"] for row in rows) == sorted(
            row["key"] for row in describe(str(tars(tiny_cache)[0]))["samples"]
        )


def test_sheet_shows_the_sample(tiny_cache: Path) -> None:
    reader = ShardReader(tiny_cache)
    for position in range(len(reader)):
        sample = reader.sample(position)
        picture = sample_sheet(sample, reader.index.categories)
        assert picture.dtype == np.uint8
        assert picture.shape[1] > 2 * TILE
        rows, columns = sample.segment_map.shape
        height, width = fitted_size(rows, columns, TILE, "longest")
        photo = resized(decode_photo(sample.photo, sample.key), (height, width))
        corners = np.argwhere((picture[: -height + 1, : -width + 1] == photo[0, 0]).all(-1))
        assert any(
            np.array_equal(picture[y : y + height, x : x + width], photo) for y, x in corners
        ), "the photo is on it as it is"


def test_crowd_is_drawn_as_stuff(tiny_cache: Path) -> None:
    reader = ShardReader(tiny_cache)
    samples = [reader.sample(position) for position in range(len(reader))]
    crowded = next(s for s in samples if any(segment.iscrowd for segment in s.segments))
    crowd = next(segment for segment in crowded.segments if segment.iscrowd)
    assert crowd.isthing
    alone = replace(crowded, segments=(crowd,), segment_map=np.ones_like(crowded.segment_map))
    page = sample_sheet(alone)
    pale, thing = (segment_colours([crowd.label], [isthing])[1] for isthing in (False, True))
    assert (page == pale).all(-1).any()
    assert not (page == thing).all(-1).any()


def test_damaged_photo_is_told(tiny_cache: Path) -> None:
    sample = replace(find_sample(str(tiny_cache))[0], photo=b"no jpeg")
    with pytest.raises(InputError, match=f"{sample.key}.jpg"):
        sample_sheet(sample)


def test_readable_sizes() -> None:
    assert [readable(n) for n in (0, 999, 4157440, 2.5e13)] == ["0 B", "999 B", "4.16 MB", "25 TB"]


def test_real_image(coco_sample: Path, tmp_path: Path) -> None:
    dataset = read_dataset(CocoLayout.of(coco_sample, "val2017"))
    render(dataset, "val2017", Storage(str(tmp_path)), RenderConfig(), workers=0)
    picture = sample_sheet(*find_sample(str(tmp_path), "439180"))
    assert picture.shape[1] < 1700
