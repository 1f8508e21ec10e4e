"""FORMAT.md tells the truth: its tables, its example and its reader are held to the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.cache.index import SampleEntry, ShardEntry, ShardIndex, Sidecar
from panoptic_cache.pipeline.cache.sample import (
    EDS_FAR,
    EDS_STEP,
    FORMAT_VERSION,
    MEMBERS,
    Sample,
    Segment,
    check_sample,
    decode_sample,
    encode_distance,
    encode_sample,
)
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import Category, Rejection
from panoptic_cache.pipeline.photo import encode_jpeg
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.targets import compute_targets

TEXT = (Path(__file__).parents[1] / "FORMAT.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def table(head: str) -> dict[str, str]:
    """Rows of the table whose first column has this head: names in code -> the rest."""
    lines = TEXT.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
    rows: dict[str, str] = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, rest = line.strip("| ").split(" | ", 1)
        rows |= dict.fromkeys(re.findall("`(.+?)`", first), rest)
    return rows


def names(cls: Any) -> list[str]:
    return [*get_type_hints(cls)]


def codes(text: str) -> list[str]:
    return re.findall("`([a-z0-9_]+)`", text)


def test_the_version_is_the_code_s() -> None:
    assert TEXT.startswith(f"# The cache format, version {FORMAT_VERSION}\n")
    assert table("field of `index.json`")["format_version"] == str(FORMAT_VERSION)


def test_the_members_are_the_code_s() -> None:
    rows = table("member")
    assert tuple(rows) == tuple(f"KEY.{suffix}" for suffix in MEMBERS)
    for name in ("eds", "void"):
        assert rows[f"KEY.{name}.png"].startswith("(H, W) uint8 |")
    assert f"steps of {EDS_STEP} px; {EDS_FAR} = {EDS_STEP * EDS_FAR} px" in rows["KEY.eds.png"]
    assert f"quality {RenderConfig().jpeg_quality}" in rows["KEY.jpg"]
    assert list(table("field of a segment")) == names(Segment)


def test_the_files_are_those_of_a_cache(tiny_cache: Path) -> None:
    patterns = [
        name.replace("{split}", "train").replace("{shard:05d}", r"\d{5}") for name in table("file")
    ]
    found = {path.name for path in tiny_cache.iterdir()}
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in found)
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in found)


def test_the_fields_are_those_of_a_cache(tiny_cache: Path) -> None:
    index = json.loads((tiny_cache / "index.json").read_text())
    rows = table("field of `index.json`")
    assert set(rows) == set(index) == {*names(ShardIndex), "digest"}
    assert codes(rows["settings"]) == names(RenderConfig)
    settings = {*names(RenderConfig)} - {"tile", "overlap"}  # those of a cache of tiles
    assert {*index["settings"]} == settings
    assert {*RenderConfig(tile=8).settings()} == {*names(RenderConfig)}
    assert codes(rows["categories"]) == names(Category)
    assert codes(rows["shards"]) == names(ShardEntry)

    sidecar = json.loads((tiny_cache / "train-00000.json").read_text())
    rows = table("field of a sidecar")
    assert set(rows) == set(sidecar) == {*names(Sidecar), "digest"}
    assert codes(rows["samples"]) == names(SampleEntry)

    plan = json.loads((tiny_cache / "plan.json").read_text())
    assert set(plan) == {"fingerprint", "settings"}
    assert set(plan["settings"]) == {"split", *settings}
    line = TEXT[TEXT.index("A line of `quarantine.jsonl` holds") :].split("\n\n")[0]
    assert [name for name in codes(line) if name in names(Rejection)] == names(Rejection)

    for file in (index, sidecar):
        assert fingerprint({k: v for k, v in file.items() if k != "digest"}) == file["digest"]


def example_maps() -> tuple[NDArray[np.uint8], ...]:
    lines = [line.split() for line in blocks("text")[0].splitlines()[1:]]
    grid = np.array(lines, np.uint8)
    return tuple(np.ascontiguousarray(part) for part in np.split(grid, 3, axis=1))


def test_the_example_is_true() -> None:
    index, eds, void = example_maps()
    (text,) = blocks("json")
    example = json.loads(text)
    assert {*example, "tile"} == set(table("field of `KEY.json`"))
    targets = compute_targets(index, [row["iscrowd"] for row in example["segments"]])
    np.testing.assert_array_equal(encode_distance(targets.distance), eds)
    np.testing.assert_array_equal(targets.void, void)
    photo = encode_jpeg(np.zeros((*index.shape, 3), np.uint8), 95)
    sample = decode_sample("000000000007", {
        **encode_sample(Sample("", 0, "", (0, 0), photo, index, eds, void, ())),
        "json": text.encode(),
    })  # fmt: skip
    check_sample(sample)
    assert json.loads(encode_sample(sample)["json"]) == example


def load_reader() -> Any:
    scope: dict[str, Any] = {}
    exec(blocks("python")[0], scope)
    return scope


def test_the_reader_reads(tiny_cache: Path) -> None:
    assert len(blocks("python")[0].split("\n\n")[1].splitlines()) <= 10
    read: Iterator[Any] = load_reader()["samples"](tiny_cache)
    reader = ShardReader(tiny_cache)
    for position, (key, row, photo, segments, eds, void) in enumerate(read):
        sample = reader.sample(position)
        assert key == sample.key
        assert row == json.loads(encode_sample(sample)["json"])
        assert photo.shape == (*sample.segment_map.shape, 3)
        for found, wanted in (
            (segments, sample.segment_map),
            (eds, sample.eds),
            (void, sample.void),
        ):
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
    assert position == len(reader) - 1


def test_the_dense_maps_are_those_of_the_code(tiny_cache: Path) -> None:
    scope = load_reader()
    script = blocks("python")[1].replace('"CACHE"', "folder")
    scope["folder"] = tiny_cache
    exec(script, scope)
    sample = ShardReader(tiny_cache).sample(11)  # the loop's last
    assert scope["key"] == sample.key
    np.testing.assert_array_equal(
        scope["centroids"].astype(np.float32).transpose(2, 0, 1), sample.centroid_map()
    )
    np.testing.assert_allclose(scope["weight"], sample.eds_weight(), atol=1e-6)


def test_datasets_reads_it(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    tars = [str(path) for path in sorted(tiny_cache.glob("*.tar"))]
    dataset = datasets.load_dataset(
        "webdataset", data_files={"train": tars}, cache_dir=str(tmp_path), split="train"
    )
    reader = ShardReader(tiny_cache)
    assert len(dataset) == len(reader)
    for position, row in enumerate(dataset):
        sample = reader.sample(position)
        assert row["__key__"] == sample.key
        assert row["json"] == json.loads(encode_sample(sample)["json"])
        for name, wanted in (
            ("segments", sample.segment_map),
            ("eds", sample.eds),
            ("void", sample.void),
        ):
            np.testing.assert_array_equal(np.asarray(row[f"{name}.png"]), wanted)
        assert row["jpg"].size == sample.segment_map.shape[::-1]
