"""Shards: the same bytes every time, for every reader, and none that is not vouched for."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from handmade import hashes, same_sample, small_samples
from msgspec import structs

import panoptic_cache.pipeline.cache.shards
from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import (
    PLAN_NAME,
    SampleEntry,
    Sidecar,
    decode_sidecar,
    encode_plan,
    encode_sidecar,
    read_index,
    read_sidecar,
)
from panoptic_cache.pipeline.cache.sample import MEMBERS, Sample, decode_sample, encode_sample
from panoptic_cache.pipeline.cache.shards import (
    ShardReader,
    finished_shard,
    members_of,
    pack_shard,
    write_shard,
)
from panoptic_cache.pipeline.coco import CocoPanoptic, Rejection
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig

SAMPLES = small_samples()


def all_samples(cache: Path) -> list[Sample]:
    """Read through the sidecars, from whole tars."""
    storage, samples = Storage(str(cache)), []
    for shard in read_index(storage).shards:
        data = storage.read(f"{shard.name}.tar")
        samples += [
            decode_sample(entry.key, members_of(data, entry))
            for entry in read_sidecar(storage, shard).samples
        ]
    return samples


def test_packing_gives_the_same_bytes() -> None:
    assert pack_shard(SAMPLES) == pack_shard(SAMPLES)
    script = (
        "import hashlib\nfrom handmade import small_samples\n"
        "from panoptic_cache.pipeline.cache.shards import pack_shard\n"
        "print(hashlib.sha256(pack_shard(small_samples())[0]).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == hashlib.sha256(pack_shard(SAMPLES)[0]).hexdigest()


def test_a_tar_holds_no_owner_and_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack_shard(SAMPLES)[0])
    with tarfile.open(tmp_path / "a.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert info.mode == 0o644
            assert info.isreg()


def test_places_are_where_the_bytes_are() -> None:
    data, entries = pack_shard(SAMPLES)
    assert [entry.key for entry in entries] == [sample.key for sample in SAMPLES]
    for entry, sample in zip(entries, SAMPLES, strict=True):
        assert members_of(data, entry) == encode_sample(sample)
        assert entry.offset % 512 == entry.size % 512 == 0
    assert not any(data[entries[-1].offset + entries[-1].size :])


def test_a_stock_tar_reader_sees_every_member(tiny_cache: Path) -> None:
    found = {}
    for path in sorted(tiny_cache.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                member = tar.extractfile(info)
                assert member is not None
                found[info.name] = member.read()
    wanted = {
        f"{sample.key}.{suffix}": data
        for sample in all_samples(tiny_cache)
        for suffix, data in encode_sample(sample).items()
    }
    assert found == wanted
    assert len(found) == 12 * len(MEMBERS)


def test_webdataset_sees_every_sample(tiny_cache: Path) -> None:
    urls = [str(path) for path in sorted(tiny_cache.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    found = {
        item["__key__"]: {k: v for k, v in item.items() if not k.startswith("__")}
        for item in dataset
    }
    assert found == {sample.key: encode_sample(sample) for sample in all_samples(tiny_cache)}


def test_the_reader_reads_any_position(tiny_cache: Path) -> None:
    reader, samples = ShardReader(tiny_cache), all_samples(tiny_cache)
    assert len(reader) == len(samples) == 12
    assert list(reader.keys) == [sample.key for sample in samples]
    for position in np.random.default_rng(0).permutation(12).tolist():
        assert same_sample(reader.sample(position), samples[position])


def test_a_reader_pickles_without_its_files(tiny_cache: Path) -> None:
    reader = ShardReader(tiny_cache)
    wanted = reader.members(5)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.__dict__["_files"] == {}
    assert copy.members(5) == wanted == reader.members(5)


def test_a_reader_holds_a_bounded_number_of_files(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panoptic_cache.pipeline.cache.shards, "_OPEN_FILES", 2)
    opened = Path("/proc/self/fd")
    reader, before = ShardReader(tiny_cache), len([*opened.iterdir()])
    for position in [0, 4, 8, 0, 8, 4, 0] * 3:
        assert same_sample(reader.sample(position), all_samples(tiny_cache)[position])
    assert len([*opened.iterdir()]) <= before + 2


def test_a_reader_leaves_files_for_others(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    """As on macOS, where a process may open 256 files, with the 463 shards of COCO."""
    config = RenderConfig(samples_per_shard=1)
    render(tiny_dataset, "train", Storage(str(tmp_path)), config, workers=0)
    script = (
        "import os, sys, resource; from pathlib import Path\n"
        "from panoptic_cache.pipeline.cache.shards import ShardReader\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n"
        "before, reader = len(os.listdir('/proc/self/fd')), ShardReader(Path(sys.argv[1]))\n"
        "assert all(reader.sample(i) for i in range(12))\n"
        "print(len(os.listdir('/proc/self/fd')) - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "4\n", done.stderr


def test_the_reader_refuses_what_the_index_does_not_vouch_for(cache: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            ShardReader(cache)

    tar, sidecar = cache / "train-00001.tar", cache / "train-00001.json"
    data = tar.read_bytes()
    tar.write_bytes(data[:-10240])
    refused("shard has .* bytes, the index says")
    tar.unlink()
    refused("shard missing")
    tar.write_bytes(data)
    text = sidecar.read_text()
    sidecar.write_text(text.replace('"offset":0', '"offset":512'))
    refused("sidecar is not the one the index names")
    sidecar.unlink()
    refused("sidecar missing")
    sidecar.write_text(text)
    assert len(ShardReader(cache)) == 12


def test_an_index_that_was_changed_is_refused(cache: Path) -> None:
    path, storage = cache / "index.json", Storage(str(cache))
    good = path.read_text()

    def refused(text: str, code: str) -> None:
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_index(storage)
        assert caught.value.code == code

    refused(good.replace('"samples": 12', '"samples": 11'), "index-damaged")
    refused(good.replace("train-00001", "train-00009"), "index-damaged")
    refused(good.replace('"format_version": 1', '"format_version": 2'), "format-version")
    for text in (good[:-20], "", "[]", "3", '{"format_version": 1}'):
        refused(text, "index-damaged")
    path.unlink()
    with pytest.raises(InputError, match="no index"):
        read_index(storage)
    path.mkdir()
    with pytest.raises(InputError, match="cannot read"):
        read_index(storage)


def test_an_index_of_missing_keys_is_named(cache: Path) -> None:
    path = cache / "index.json"
    values = json.loads(path.read_text())
    del values["categories"], values["digest"]
    values["digest"] = fingerprint(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="missing required field `categories`"):
        read_index(Storage(str(cache)))


def test_sidecars_survive_encoding(tiny_cache: Path) -> None:
    sidecar = Sidecar(
        name="x-00000",
        fingerprint="f",
        size=10240,
        sha256="0",
        samples=(SampleEntry("é", 0, 3072, 5, ((512, 3),) * 5),),
        rejections=(
            Rejection("id", "caf\udce9.jpg", "photo-damaged", "bad"),
            Rejection(3, "", "", ""),
        ),
        repairs={"area-wrong": 3},
    )
    for each in (sidecar, structs.replace(sidecar, samples=(), rejections=())):
        data = encode_sidecar(each)
        assert decode_sidecar(data, "x") == each
        assert data.count(b"\n") == len(each.samples) + 2 + (not each.samples)
    shard = read_index(Storage(str(tiny_cache))).shards[0]
    read = read_sidecar(Storage(str(tiny_cache)), shard)
    assert encode_sidecar(read) == (tiny_cache / f"{shard.name}.json").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"crc32":', '"crc":', "unknown field `crc` - at `$.samples[0]`"),
        ('"repairs":{},', "", "missing required field `repairs`"),
        ('"offset":0', '"offset":"0"', "Expected `int`, got `str` - at `$.samples[0].offset`"),
        ('"members":[[', '"members":[[1,2],[', "length <= 5 - at `$.samples[0].members`"),
        ('"repairs":{}', '"repairs":{"a":null}', "got `null` - at `$.repairs[...]`"),
        ('"samples":[', '"samples":[3,', "Expected `object`, got `int` - at `$.samples[0]`"),
        ('"samples":[', '"samples":', "Expected `array`, got `object`"),
    ],
)
def test_what_is_wrong_with_a_sidecar_is_named(old: str, new: str, message: str) -> None:
    data, entries = pack_shard(SAMPLES)
    text = encode_sidecar(Sidecar("x-00000", "p", len(data), "0", entries, (), {})).decode()
    with pytest.raises(InputError, match="x-00000") as caught:
        decode_sidecar(text.replace(old, new).encode(), "x-00000.json")
    assert "x-00000.json: not a sidecar: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_is_finished_only_with_a_true_sidecar(tmp_path: Path) -> None:
    storage, name = Storage(str(tmp_path)), "x-00000"
    sidecar = write_shard(storage, name, SAMPLES, plan="p", rejections=(), repairs={"a": 0})
    path = tmp_path / f"{name}.json"
    good = path.read_bytes()

    def finished(plan: str = "p") -> Sidecar | None:
        return finished_shard(storage, name, plan, storage.sizes())

    assert finished() == sidecar
    assert sidecar.repairs == {}
    assert finished("other") is None
    for text in (
        good[:-5],
        good.replace(b'"crc32":', b'"crc32":1'),
        good.replace(b'"offset":0', b'"offset":512'),
        good.replace(b'"sha256":"', b'"sha256":"0'),
        good + b"\n",
        b"{}",
    ):
        path.write_bytes(text)
        assert finished() is None
    path.write_bytes(good)
    shutil.copy(path, tmp_path / "x-00001.json")
    shutil.copy(tmp_path / f"{name}.tar", tmp_path / "x-00001.tar")
    assert finished_shard(storage, "x-00001", "p", storage.sizes()) is None
    os.truncate(tmp_path / f"{name}.tar", sidecar.size - 512)
    assert finished() is None
    path.unlink()
    assert finished() is None


def test_a_job_left_behind_does_not_overwrite_another_plan(tmp_path: Path) -> None:
    """Dask cannot stop a running job: it may end after its driver, and after the next one began."""
    storage, name = Storage(str(tmp_path)), "x-00000"
    storage.write(PLAN_NAME, encode_plan("new", {}))
    write_shard(storage, name, SAMPLES, plan="new", rejections=(), repairs={})
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="belongs to another run"):
        write_shard(storage, name, SAMPLES[:1], plan="old", rejections=(), repairs={})
    assert hashes(tmp_path) == before


def test_an_old_sidecar_never_vouches_for_a_new_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, name = Storage(str(tmp_path)), "x-00000"
    write_shard(storage, name, SAMPLES, plan="p", rejections=(), repairs={})

    write = Storage.write

    def killed(self: Storage, name: str, data: bytes) -> None:
        if name.endswith(".json"):
            raise KeyboardInterrupt
        write(self, name, data)

    monkeypatch.setattr(Storage, "write", killed)
    others = [replace(sample, image_id=99) for sample in SAMPLES]
    with pytest.raises(KeyboardInterrupt):
        write_shard(storage, name, others, plan="p", rejections=(), repairs={})
    assert set(hashes(tmp_path)) == {f"{name}.tar"}
