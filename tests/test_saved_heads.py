"""Heads saved by `evaluate --save-heads`, and what `bench decode --heads` makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from msgspec.structs import replace

from panoptic_cache.evaluate.metric.score import score_image
from panoptic_cache.evaluate.study import bench
from panoptic_cache.evaluate.study.comparison import Comparison, Trial, compare_decoders
from panoptic_cache.evaluate.study.corruption import Corruption, corrupted_heads
from panoptic_cache.evaluate.study.heads import (
    ImageHeads,
    Meta,
    Part,
    in_part,
    list_heads,
    read_heads,
    read_meta,
    save_heads,
    save_meta,
)
from panoptic_cache.evaluate.study.rivals import Rival, rivals
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category, CocoLayout, CocoPanoptic
from panoptic_cache.train.encoding import PositionalCode

SHARED = Path(__file__).parents[1] / "../shared/real/heads"
PARTS: tuple[Part, ...] = ("all", "tuning", "reporting")
ROW = {"decoder", "All", "Things", "Stuff", "agnostic", "tp", "fp", "fn", "ms"}


@pytest.fixture
def saved(tiny_dataset: CocoPanoptic, tmp_path: Path) -> Path:
    """Perfect heads of five made-up scenes, with a code of L = 2."""
    folder = tmp_path / "heads"
    folder.mkdir()
    save_meta(folder, Meta(network_size=56, harmonics=2, categories=tiny_dataset.categories))
    few = tiny_dataset.spread(5)
    for image in corrupted_heads(few, Corruption(56), PositionalCode(2)):
        save_heads(folder, image)
    return folder


def few_settings(size: int) -> dict[str, dict[str, Rival]]:
    """The rivals, each with its quickest setting."""
    return {name: dict([*settings.items()][:1]) for name, settings in rivals(size).items()}


def test_what_is_saved_is_read_back(saved: Path, tiny_dataset: CocoPanoptic) -> None:
    meta = read_meta(saved)
    assert meta.categories == tiny_dataset.categories
    assert meta.code() == PositionalCode(2)
    images = corrupted_heads(tiny_dataset.spread(5), Corruption(56), PositionalCode(2))
    by_name = sorted(images, key=lambda image: image.name)
    for mine, theirs in zip(read_heads(list_heads(saved), meta), by_name, strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.instance, theirs.instance.half().float())
        assert torch.equal(mine.semantic, theirs.semantic)
        assert np.array_equal(mine.ids, theirs.ids)
        assert [s.id for s in mine.segments] == [s.id for s in theirs.segments]


def test_tuning_and_reporting_share_no_image(saved: Path) -> None:
    tuning, reporting = (list_heads(saved, part) for part in ("tuning", "reporting"))
    assert (len(tuning), len(reporting)) == (3, 2)
    assert sorted([*tuning, *reporting]) == list_heads(saved)
    assert in_part(["c", "a", "b"], "tuning") == ["a", "c"]


def test_the_benchmark_of_saved_heads(
    run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "rivals", few_settings)
    code, out, _ = run("bench", "decode", "--heads", saved, "--json")
    assert code == 0
    found = json.loads(out)
    rows = {row["decoder"]: row for row in found["rows"]}
    assert rows.keys() >= {"ours", "components", "known instances", "soft votes"}
    assert all(row.keys() >= ROW for row in rows.values())
    assert rows["ours"]["All"] > 80
    assert rows["ours"]["interval"] is None
    low, high = rows["components"]["interval"]
    assert low <= rows["components"]["behind"] <= high
    (measured,) = found["measured"].values()
    assert measured["noise"] < 0.001
    code, out, _ = run("bench", "decode", "--heads", saved, "--part", "tuning", "--count", 1)
    assert code == 0
    assert "decoding 1 images of heads" in out
    assert "measured drift" in out
    for more in (("--coco", saved), ("--drift", 2)):
        assert run("bench", "decode", "--heads", saved, *more)[0] == 2


def test_an_evaluation_saves_its_heads(
    run: Run, trained: Path, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "rivals", few_settings)
    options = ("--checkpoint", trained, "--coco", tiny_root, "--split", "val", "--device", "cpu")
    heads = tmp_path / "heads"
    command = ("evaluate", *options, "--out", tmp_path / "out", "--save-heads", heads, "--json")
    code, out, _ = run(*command)
    assert code == 0
    meta = read_meta(heads)
    assert (meta.network_size, meta.harmonics, meta.step) == (56, 4, 2)
    images = [*read_heads(list_heads(heads), meta)]
    assert [image.instance.shape for image in images] == [(16, 56, 56)] * 4
    code, again, _ = run("bench", "decode", "--heads", heads, "--json")
    assert code == 0
    ours = json.loads(again)["rows"][0]
    wanted = json.loads(out)["All"]["pq"]
    assert ours["All"] == pytest.approx(100 * wanted, abs=0.2), "float16 is nearly the same"


def test_heads_of_two_networks_are_not_mixed(saved: Path) -> None:
    meta = read_meta(saved)
    save_meta(saved, meta)  # an evaluation that goes on
    with pytest.raises(InputError, match="heads of another network"):
        save_meta(saved, replace(meta, step=3))


def test_which_code(run: Run, trained: Path, tiny_root: Path) -> None:
    options: tuple[object, ...] = (
        "ceiling",
        "--coco",
        tiny_root,
        "--split",
        "val",
        "--size",
        112,
        "--json",
    )
    options = (*options, "--noise", 1)
    found = {}
    for name, more in (
        ("default", ()),
        ("run", ("--checkpoint", trained)),
        ("one", ("--harmonics", 1)),
        ("drift", ("--drift", 8)),
    ):
        code, out, _ = run(*options, *more)
        assert code == 0
        found[name] = json.loads(out)
    assert found["run"]["All"] == found["default"]["All"]
    assert found["one"]["measured"] != found["default"]["measured"]
    assert found["drift"]["measured"]["drift"] > found["default"]["measured"]["drift"]
    assert run(*options, "--harmonics", 2, "--checkpoint", trained)[0] == 2


def _drop(folder: Path, key: str) -> None:
    _change(folder, **{key: None})


def _change(folder: Path, **changes: Any) -> None:
    path = list_heads(folder)[1]
    with np.load(path) as file:
        values = {**file, **changes}
    np.savez(path, **{key: value for key, value in values.items() if value is not None})


def _meta(folder: Path, **changes: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "meta.json: no folder of saved heads"),
    "no JSON": (lambda f: (f / "meta.json").write_text("{"), "meta.json: malformed"),
    "another type": (lambda f: _meta(f, harmonics="two"), r"meta.json: malformed.*harmonics"),
    "labels": (lambda f: _meta(f, categories=[{"id": 1, "name": "a", "isthing": True, "label": 1}]),
        "meta.json: malformed: categories are not listed by label"),
    "no images": (lambda f: [p.rename(f"{p}.old") for p in list_heads(f)], "no saved heads"),
    "cut": (lambda f: list_heads(f)[1].write_bytes(list_heads(f)[1].read_bytes()[:900]), "damaged"),
    "empty": (lambda f: list_heads(f)[1].write_bytes(b""), "damaged"),
    "no codes": (lambda f: _drop(f, "instance"), "`instance` is missing"),
    "another code": (lambda f: _meta(f, harmonics=3), "shapes do not fit meta.json"),
    "sizes": (lambda f: _change(f, semantic=np.zeros((9, 3, 3))), "shapes do not fit meta.json"),
    "table": (lambda f: _change(f, seg_iscrowd=np.zeros(1)), "shapes do not fit meta.json"),
    "category": (
        lambda f: _change(f, seg_id=np.ones(1), seg_category=[99], seg_iscrowd=np.zeros(1)),
        "unknown category 99",
    ),
    "not finite": (
        lambda f: _change(f, instance=np.full((8, 56, 56), np.nan, np.float16)), "NaN"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_heads_are_one_line(name: str, run: Run, saved: Path) -> None:
    spoil, message = BAD[name]
    spoil(saved)
    code, out, err = run("bench", "decode", "--heads", saved, "--json")
    assert (code, out) == (1, "")
    (line,) = (line for line in err.splitlines() if "images," not in line)
    assert str(saved) in line
    assert re.search(message, line), line


def test_the_interval_is_paired() -> None:
    """Two decoders that miss the same segments differ by nothing, however images differ."""
    categories = (Category(1, "disc", True, 0),)
    ids = np.ones((4, 4), np.int32)
    gt = [SegmentInfo(1, 1, False)]
    things = frozenset({1})

    def image(found: bool) -> Any:
        pred = ids if found else np.zeros_like(ids)
        segments = {1: 1} if found else {}
        return score_image(1, ids, gt, pred, segments, scores={}, things=things)

    right, wrong = image(True), image(False)
    found = Comparison(
        categories,
        {
            "a": Trial([right, wrong] * 20),
            "b": Trial([right, wrong] * 20),
            "c": Trial([wrong, wrong] * 20),
        },
    )
    assert found.interval("a", "b") == (0, 0)
    low, high = found.interval("a", "c")
    assert 0.45 < low < 0.6
    assert 0.73 < high < 0.88


@pytest.mark.parametrize("name", ["demo", "nuclei", "coco27"])
def test_the_heads_of_real_networks_fit(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the heads of real networks are not here")
    meta = read_meta(SHARED / name)
    image = next(read_heads(list_heads(SHARED / name), meta))
    assert image.instance.shape == (4 * meta.harmonics, meta.network_size, meta.network_size)


def test_what_settings_were_found_on_is_told(
    tiny_root: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of networks and of splits; the parts of a split are those of all its photos."""
    monkeypatch.setattr(bench, "rivals", lambda _: {})
    monkeypatch.setattr(bench, "LEVELS", (0,))
    seen: dict[str, set[str]] = {}

    def note(images: Iterator[ImageHeads], count: int, *rest: Any, **more: Any) -> Comparison:
        kept = [*images]
        seen[part] |= {image.name for image in kept}
        return compare_decoders(iter(kept), count, *rest, **more)

    monkeypatch.setattr(bench, "compare_decoders", note)
    for part in PARTS[1:]:
        seen[part] = set()
        for count in (2, 3, 5):
            layout = CocoLayout.of(tiny_root, "train")
            found = bench.bench_decode(layout, count, Corruption(56), part=part)
            assert "settings were found" not in found.title
    assert not seen["tuning"] & seen["reporting"]
    monkeypatch.setattr(bench, "TUNED_ON", {"train"})
    for part in PARTS:
        seen[part] = set()
    told = [bench.bench_decode(layout, 1, Corruption(56), part=part).title for part in PARTS]
    assert ["settings were found" in title for title in told] == [True, True, False]
    facts = json.loads((saved / "meta.json").read_text()) | {"name": "train"}
    (saved / "meta.json").write_text(json.dumps(facts))
    told = [bench.bench_heads(saved, part, 1).title for part in PARTS]
    assert ["settings were found" in title for title in told] == [True, True, False]
