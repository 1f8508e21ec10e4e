"""Verification: every kind of harm is found, and the damaged sample is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from handmade import make_sample
from msgspec import structs, to_builtins

from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import (
    SampleEntry,
    ShardEntry,
    ShardIndex,
    Sidecar,
    encode_index,
    encode_plan,
    encode_sidecar,
    read_index,
    read_sidecar,
)
from panoptic_cache.pipeline.cache.sample import Sample, encode_sample
from panoptic_cache.pipeline.cache.shards import (
    ShardReader,
    finished_shard,
    pack_shard,
    write_shard,
)
from panoptic_cache.pipeline.cache.verify import VerifyReport, verify
from panoptic_cache.pipeline.coco import Category, CocoLayout, read_dataset
from panoptic_cache.pipeline.photo import encode_jpeg
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig

NAME = "train-00001"


def check(cache: Path, *, deep: bool = True) -> VerifyReport:
    return verify(Storage(str(cache)), deep=deep)


def sidecar_of(cache: Path, number: int = 1) -> Sidecar:
    storage = Storage(str(cache))
    return read_sidecar(storage, read_index(storage).shards[number])


def flip(path: Path, position: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)


@pytest.mark.parametrize("deep", [False, True])
def test_a_finished_cache_is_fine(tiny_cache: Path, deep: bool) -> None:
    report = check(tiny_cache, deep=deep)
    assert to_builtins(report) == {"ok": True, "shards": 3, "samples": 12, "problems": []}


def test_photos_of_several_folders_may_have_one_stem(root: Path, tmp_path: Path) -> None:
    layout = CocoLayout.of(root, "val")
    content = json.loads(layout.panoptic_json.read_bytes())
    annotations = {row["image_id"]: row for row in content["annotations"]}
    for number, image in enumerate(content["images"]):
        name = f"{'abcd'[number]}/one.jpg"
        (layout.images / name).parent.mkdir()
        (layout.images / image["file_name"]).rename(layout.images / name)
        annotations[image["id"]]["image_id"] = image["id"] = f"text/{number}"
        image["file_name"] = name
    layout.panoptic_json.write_text(json.dumps(content))
    for config in (RenderConfig(), RenderConfig(tile=40)):
        storage = Storage(str(tmp_path / f"cache{config.tile}"))
        render(read_dataset(layout), "val", storage, config, workers=0)
        assert verify(storage, deep=True).problems == []


def test_a_report_is_what_json_prints(cache: Path) -> None:
    flip(cache / f"{NAME}.tar", 1500)
    report = json.loads(json.dumps(to_builtins(check(cache))))
    key = sidecar_of(cache).samples[0].key
    assert report == {
        "ok": False,
        "shards": 3,
        "samples": 12,
        "problems": [
            {"shard": NAME, "problem": "shard has other bytes than were written (SHA-256 differs)"},
            {"shard": NAME, "sample": key, "problem": "sample has other bytes than were written"},
        ],
    }


@pytest.mark.parametrize("where", ["header", "payload", "sample boundary", "end marker"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_cut_shard_is_found(cache: Path, where: str, deep: bool) -> None:
    sidecar = sidecar_of(cache)
    third = sidecar.samples[2]
    length = {
        "header": third.members[1][0] - 100,
        "payload": third.members[3][0] + 5,
        "sample boundary": third.offset,
        "end marker": sidecar.samples[3].offset + sidecar.samples[3].size + 512,
    }[where]
    os.truncate(cache / f"{NAME}.tar", length)
    report = check(cache, deep=deep)
    assert {problem.shard for problem in report.problems} == {NAME}
    assert "bytes, the index says" in report.problems[0].problem
    named = [(p.sample, p.problem) for p in report.problems if p.sample]
    last = (sidecar.samples[3].key, "sample is gone")
    if not deep or where == "end marker":
        assert named == []
    elif where == "sample boundary":
        assert named == [(third.key, "sample is gone"), last]
    else:
        assert named == [(third.key, "sample is cut off"), last]


@pytest.mark.parametrize("number", [0, 3])
def test_a_flipped_byte_names_its_sample(cache: Path, number: int) -> None:
    entry = sidecar_of(cache).samples[number]
    rng = np.random.default_rng(number)
    places = [entry.offset, entry.offset + 100, entry.offset + entry.size - 1]
    places += [start for start, _ in entry.members]
    places += rng.integers(entry.offset, entry.offset + entry.size, 5).tolist()
    for place in places:
        flip(cache / f"{NAME}.tar", place)
        assert check(cache, deep=False).ok  # the tars are not read
        problems = check(cache).problems
        assert [(p.shard, p.sample) for p in problems] == [(NAME, None), (NAME, entry.key)]
        flip(cache / f"{NAME}.tar", place)
    assert check(cache).ok


def test_a_flipped_byte_in_the_end_marker_is_found(cache: Path) -> None:
    flip(cache / f"{NAME}.tar", -5)
    assert check(cache).problems[1].problem == "the tar's end marker is damaged"


def test_no_flipped_byte_goes_unnoticed(cache: Path) -> None:
    rng = np.random.default_rng(0)
    (cache / "quarantine.jsonl").write_text("")
    files = sorted(path for path in cache.iterdir() if path.stat().st_size)
    assert len(files) == 8
    for file in (files * 8)[:60]:
        place = int(rng.integers(file.stat().st_size))
        bits = int(rng.integers(1, 256))
        flip(file, place, bits)
        report = check(cache)
        assert not report.ok, f"{file.name}, byte {place} ^ {bits}"
        assert {problem.shard for problem in report.problems} <= {file.stem, file.name}
        flip(file, place, bits)
    assert check(cache).ok


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("name", "shard"),
    [
        (f"{NAME}.tar", NAME),
        (f"{NAME}.json", NAME),
        ("plan.json", "plan.json"),
        ("quarantine.jsonl", "quarantine.jsonl"),
        ("index.json", "index.json"),
    ],
)
def test_a_missing_file_is_named(cache: Path, name: str, shard: str, deep: bool) -> None:
    (cache / name).unlink()
    report = check(cache, deep=deep)
    assert [problem.shard for problem in report.problems] == [shard]
    assert (report.shards, report.samples) == (3, 12)


@pytest.mark.parametrize("name", ["train-00003.tar", "train-00003.json", "val-00000.tar"])
def test_a_file_that_does_not_belong_is_named(cache: Path, name: str) -> None:
    (cache / name).write_bytes((cache / f"{NAME}{Path(name).suffix}").read_bytes())
    report = check(cache, deep=False)
    assert [str(problem) for problem in report.problems] == [
        f"{name}: the index knows no such file"
    ]


def test_notes_and_leftovers_of_a_killed_run_do_no_harm(cache: Path) -> None:
    (cache / "README.md").write_text("A cache.")
    (cache / ".tmp-train-00003.tar-0badcafe").write_text("half")
    (cache / ".lock").touch()
    assert check(cache).ok


def test_swapped_shards_are_found(cache: Path) -> None:
    # Of one size, so that only their bytes tell them apart.
    assert len({path.stat().st_size for path in cache.glob("*.tar")}) == 1
    swap(cache / "train-00000.tar", cache / "train-00001.tar")
    assert check(cache, deep=False).ok
    assert [str(problem) for problem in check(cache).problems] == [
        "train-00000: shard holds the bytes of train-00001 (SHA-256 differs)",
        "train-00001: shard holds the bytes of train-00000 (SHA-256 differs)",
    ]


@pytest.mark.parametrize("tars", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_swapped_sidecars_are_found(cache: Path, tars: bool, deep: bool) -> None:
    swap(cache / "train-00000.json", cache / "train-00001.json")
    if tars:
        swap(cache / "train-00000.tar", cache / "train-00001.tar")
    problems = check(cache, deep=deep).problems
    for name in ("train-00000", "train-00001"):
        found = [problem.problem for problem in problems if problem.shard == name]
        assert found[0] == "sidecar is not the one the index names"
        assert any("holds the bytes of" in text for text in found) == (tars and deep)


def edit_index(cache: Path, change: Callable[[str], str]) -> None:
    path = cache / "index.json"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"samples": 12', '"samples": 13'),
        lambda text: text.replace('"name": "ball"', '"name": "bell"'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text[:-30],
        lambda text: text + "\n",
        lambda text: text.replace(" ", ""),
        lambda text: json.dumps(json.loads(text), indent=2),
    ],
)
def test_an_edited_index_is_found(cache: Path, change: Callable[[str], str]) -> None:
    edit_index(cache, change)
    problems = check(cache, deep=False).problems
    assert [problem.shard for problem in problems] == ["index.json"]


def test_without_an_index_the_shards_are_checked_all_the_same(cache: Path) -> None:
    edit_index(cache, lambda text: text[:-30])
    flip(cache / "train-00000.tar", 700)
    flip(cache / "train-00001.json", 100)
    os.truncate(cache / "train-00002.tar", 10240)
    report = check(cache)
    assert report.shards == 3
    assert {p.shard for p in report.problems} == {
        "index.json", "train-00000", "train-00001", "train-00002",
    }  # fmt: skip


def test_every_problem_is_reported(cache: Path) -> None:
    samples = sidecar_of(cache).samples
    for entry in samples[:3]:
        flip(cache / f"{NAME}.tar", entry.members[4][0])
    (cache / "train-00000.tar").unlink()
    (cache / "train-00002.json").unlink()
    (cache / "plan.json").write_text("{}")
    (cache / "quarantine.jsonl").write_text("{}\n")
    report = check(cache)
    assert [(p.shard, p.sample) for p in report.problems] == [
        ("plan.json", None),
        ("quarantine.jsonl", None),
        ("train-00000", None),
        (NAME, None),
        *((NAME, entry.key) for entry in samples[:3]),
        ("train-00002", None),
    ]


def test_a_folder_that_is_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        check(tmp_path / "nowhere")
    report = check(tmp_path)
    assert [str(problem) for problem in report.problems] == [
        "index.json: no index: no cache, or one that is not finished"
    ]


def test_a_disk_that_fails_hides_nothing_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Storage.read

    def broken(self: Storage, name: str, size: int | None = None) -> bytes:
        if name in {"train-00000.tar", "train-00001.json"}:
            raise OSError(5, "Input/output error")
        return read(self, name)

    monkeypatch.setattr(Storage, "read", broken)
    found = [(p.shard, "Input/output error" in p.problem) for p in check(cache).problems]
    assert found == [("train-00000", True), ("train-00001", True)]


# Wrong although every hash is right: what a faulty writer would leave behind.

INDEX = np.array([[1, 1, 2], [1, 1, 0]], np.uint8).repeat(4, 0).repeat(4, 1)
GOOD = make_sample(INDEX, things=[1])
CATEGORIES = (Category(11, "cat", True, 0), Category(12, "sea", False, 1))


def write_cache(
    folder: Path,
    samples: list[Sample],
    change: Callable[[Sidecar], Sidecar] = lambda sidecar: sidecar,
    tar: Callable[[bytes], bytes] = lambda data: data,
    *,
    deep: bool = True,
) -> VerifyReport:
    """A cache of one shard whose hashes vouch for whatever it holds."""
    storage = Storage(str(folder))
    storage.create()
    sidecar = write_shard(storage, "x-00000", samples, plan="p", rejections=(), repairs={})
    data = tar(storage.read("x-00000.tar"))
    sidecar = structs.replace(sidecar, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    sidecar = change(sidecar)
    storage.write("x-00000.tar", data)
    storage.write("x-00000.json", encode_sidecar(sidecar))
    shard = ShardEntry(
        "x-00000",
        len(samples),
        len(data),
        hashlib.sha256(data).hexdigest(),
        hashlib.sha256(encode_sidecar(sidecar)).hexdigest(),
    )
    index = ShardIndex(
        format_version=1,
        split="x",
        fingerprint="p",
        settings={},
        categories=CATEGORIES,
        samples=len(samples),
        quarantined=0,
        quarantine_sha256=hashlib.sha256(b"").hexdigest(),
        shards=(shard,),
    )
    storage.write("quarantine.jsonl", b"")
    storage.write("plan.json", encode_plan("p", {"split": "x"}))
    storage.write("index.json", encode_index(index))
    return check(folder, deep=deep)


def first_segment(sample: Sample, **changes: object) -> Sample:
    return replace(
        sample,
        segments=(replace(sample.segments[0], **changes), *sample.segments[1:]),  # type: ignore[arg-type]
    )


def change_entry(**changes: object) -> Callable[[Sidecar], Sidecar]:
    def change(sidecar: Sidecar) -> Sidecar:
        entry = structs.replace(sidecar.samples[0], **changes)
        return structs.replace(sidecar, samples=(entry, *sidecar.samples[1:]))

    return change


def test_a_true_cache_made_by_hand_is_fine(tmp_path: Path) -> None:
    assert write_cache(tmp_path, [GOOD]).problems == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (first_segment(GOOD, area=3), "does not match the map"),
        (first_segment(GOOD, label=1), "does not match the index's categories"),
        (first_segment(GOOD, category_id=77), "does not match the index's categories"),
        (replace(GOOD, eds=np.zeros_like(GOOD.eds)), "EDS codes do not match"),
        (replace(GOOD, void=np.zeros_like(GOOD.void)), "void mask does not match"),
        (replace(GOOD, void=np.zeros((2, 2), np.uint8)), "map is"),
        (replace(GOOD, image_id=2), "key and image id disagree"),
        (replace(GOOD, photo=b"no photo"), "photo damaged"),
        (replace(GOOD, photo=GOOD.photo[:-30]), "photo damaged"),
        (replace(GOOD, photo=encode_jpeg(np.zeros((4, 4, 3), np.uint8), 90)), r"photo is \(4, 4\)"),
        (replace(GOOD, photo=bytes(cv2.imencode(".png", INDEX)[1])), "photo damaged"),
    ],
)
def test_a_sample_that_was_written_wrong_is_named(
    tmp_path: Path, sample: Sample, message: str
) -> None:
    other = replace(GOOD, key="000000000005", image_id=5)
    report = write_cache(tmp_path, [other, sample])
    assert [problem.sample for problem in report.problems] == [GOOD.key]
    assert re.search(message, report.problems[0].problem)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (first_segment(GOOD, label=5_000), "no label of the cache"),
        (first_segment(GOOD, label=-1), "no segment table"),
        (first_segment(GOOD, area="many"), "no segment table"),
        (first_segment(GOOD, centroid=(float("nan"), 0.0)), "no segment table"),
        (first_segment(GOOD, id=1 << 70), "no segment table"),
        (replace(GOOD, segments=()), "segment map and table disagree"),
    ],
)
def test_a_sample_that_was_written_wrong_is_not_trained_on(
    tmp_path: Path, sample: Sample, message: str
) -> None:
    assert not write_cache(tmp_path, [sample]).ok
    with pytest.raises(InputError, match=message):
        ShardReader(tmp_path).sample(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"categories": ()}, "categories are not labelled"),
        ({"categories": CATEGORIES[1:]}, "categories are not labelled"),
        ({"samples": 1 << 70}, "out of range|<="),
        ({"shards": (ShardEntry("../x-00000", 1, 1, "", ""),)}, "matching regex"),
    ],
)
def test_an_index_that_vouches_for_nonsense_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    write_cache(tmp_path, [GOOD])
    index = structs.replace(read_index(Storage(str(tmp_path))), **values)
    (tmp_path / "index.json").write_bytes(encode_index(index))
    with pytest.raises(InputError, match=message):
        ShardReader(tmp_path)
    assert check(tmp_path).problems[0].shard == "index.json"


@pytest.mark.parametrize("place", [10_240, (1 << 62) - 1])
def test_a_sample_outside_of_its_shard_is_refused(tmp_path: Path, place: int) -> None:
    write_cache(tmp_path, [GOOD], change_entry(members=((place, 1),) * 5), deep=False)
    with pytest.raises(InputError, match="outside of its shard"):
        ShardReader(tmp_path)


def test_a_sample_that_is_there_twice_is_named(tmp_path: Path) -> None:
    report = write_cache(tmp_path, [GOOD, GOOD])
    assert [(p.sample, p.problem) for p in report.problems] == [
        (GOOD.key, "sample is there more than once")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_entry(offset=512), "its place in the sidecar is impossible"),
        (change_entry(size=512), "its place in the sidecar is impossible"),
        (change_entry(members=((512, 1),) * 5), "its place in the sidecar is impossible"),
        (change_entry(members=()), "sidecar is not the one the index names|not a sidecar"),
        (lambda sidecar: structs.replace(sidecar, samples=()), "sidecar and index disagree"),
        (lambda sidecar: structs.replace(sidecar, name="x-00001"), "sidecar and index disagree"),
        (lambda sidecar: structs.replace(sidecar, size=10240 * 9), "sidecar and index disagree"),
        (lambda sidecar: structs.replace(sidecar, sha256="0"), "sidecar and index disagree"),
        (lambda sidecar: structs.replace(sidecar, fingerprint="q"), "sidecar and index disagree"),
    ],
)
def test_an_impossible_sidecar_is_found(
    tmp_path: Path, change: Callable[[Sidecar], Sidecar], message: str
) -> None:
    report = write_cache(tmp_path, [GOOD], change, deep=False)
    assert re.search(message, report.problems[0].problem)
    assert not check(tmp_path).ok


def test_a_sidecar_with_an_unknown_field_is_found(tmp_path: Path) -> None:
    write_cache(tmp_path, [GOOD])
    path, index = tmp_path / "x-00000.json", read_index(Storage(str(tmp_path)))
    path.write_bytes(path.read_bytes().replace(b'"crc32":', b'"colour":1,"crc32":'))
    shard = structs.replace(
        index.shards[0], sidecar_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    (tmp_path / "index.json").write_bytes(encode_index(structs.replace(index, shards=(shard,))))
    (problem,) = check(tmp_path).problems
    assert (
        problem.problem
        == "not a sidecar: Object contains unknown field `colour` - at `$.samples[0]`"
    )


def test_members_that_overlap_are_found(tmp_path: Path) -> None:
    def overlap(sidecar: Sidecar) -> Sidecar:
        first, _, *others = sidecar.samples[0].members
        return change_entry(members=(first, first, *others))(sidecar)

    (problem,) = write_cache(tmp_path, [GOOD], overlap, deep=False).problems
    assert problem.sample == GOOD.key


def test_a_tar_without_an_end_marker_is_found(tmp_path: Path) -> None:
    end = pack_shard([GOOD])[1][0].size
    (problem,) = write_cache(tmp_path, [GOOD], tar=lambda data: data[:end], deep=False).problems
    assert problem.problem == "the sidecar leaves no room for the tar's end marker"


def test_headers_that_tell_another_story_are_found(tmp_path: Path) -> None:
    data, entries = pack_shard([GOOD])
    other, _ = pack_shard([replace(GOOD, key="000000000002")])
    assert [data[a : a + n] for a, n in entries[0].members] == list(encode_sample(GOOD).values())

    def with_new_crc(sidecar: Sidecar) -> Sidecar:
        return structs.replace(sidecar, samples=entries_with_crc(entries, other))

    report = write_cache(tmp_path, [GOOD], with_new_crc, tar=lambda _: other)
    assert [p.problem for p in report.problems] == ["tar headers and sidecar disagree"]


def entries_with_crc(entries: tuple[SampleEntry, ...], data: bytes) -> tuple[SampleEntry, ...]:
    spans = [data[entry.offset : entry.offset + entry.size] for entry in entries]
    return tuple(
        structs.replace(entry, crc32=zlib.crc32(span))
        for entry, span in zip(entries, spans, strict=True)
    )


def test_an_index_that_does_not_add_up_is_found(cache: Path) -> None:
    path = cache / "index.json"
    values = json.loads(path.read_text())
    values["samples"], values["quarantined"] = 13, 1
    del values["digest"]
    values["digest"] = fingerprint(values)
    path.write_text(json.dumps(values, indent=1) + "\n")
    assert [(p.shard, p.problem) for p in check(cache, deep=False).problems] == [
        ("index.json", "the shards' samples do not add up to the total"),
        ("quarantine.jsonl", "the index counts 1 images"),
    ]


def test_a_remedied_shard_is_rendered_again(cache: Path) -> None:
    storage = Storage(str(cache))
    plan = read_index(storage).fingerprint
    assert finished_shard(storage, NAME, plan, storage.sizes()) is not None
    (cache / f"{NAME}.json").unlink()
    assert finished_shard(storage, NAME, plan, storage.sizes()) is None
