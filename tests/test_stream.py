"""The stream reader: the same batches' format, every shard read, from a folder and over HTTP."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
from torch import Tensor

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.caches import open_caches
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.data import Batch, Share
from panoptic_cache.train.loader import iterate, make_loader

SMALL = DataConfig(reader="stream", size=56, batch=4, micro_batch=4, workers=0)


def stream(
    config: DataConfig, steps: range = range(100), rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    return iterate(
        make_loader(config, open_caches(config), Share(seed=3, steps=steps, rank=rank, world=world))
    )


@pytest.fixture
def served(tiny_cache: Path) -> Iterator[str]:
    """URL of a real HTTP server of `tiny_cache`, on loopback."""
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tiny_cache)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_both_readers_have_one_format(tiny_cache: Path) -> None:
    config = replace(SMALL, cache=str(tiny_cache))
    streamed, indexed = next(stream(config)), next(stream(replace(config, reader="indexed")))
    for field in fields(Batch):
        one, other = getattr(streamed, field.name), getattr(indexed, field.name)
        if field.name == "keys":
            assert len(one) == len(other) == 4
        else:
            assert one.dtype == other.dtype, field.name
            assert one.ndim == other.ndim, field.name


def test_the_same_sample_is_the_same_item(tiny_cache: Path) -> None:
    config = replace(SMALL, cache=str(tiny_cache), augment=False)
    by_key: dict[str, Tensor] = {}
    for batch in islice(stream(replace(config, reader="indexed")), 3):
        by_key |= {key: batch.photo[row] for row, key in enumerate(batch.keys)}
    for batch in islice(stream(config), 3):
        for row, key in enumerate(batch.keys):
            assert (batch.photo[row] == by_key[key]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_come_in_the_sizes_of_a_step(tiny_cache: Path, workers: int) -> None:
    config = replace(SMALL, cache=str(tiny_cache), batch=5, micro_batch=2, workers=workers)
    sizes = [len(batch.keys) for batch in islice(stream(config), 7)]
    assert sizes == [2, 2, 1, 2, 2, 1, 2]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_round_reads_each_sample_once(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, world: int, workers: int
) -> None:
    config = replace(SMALL, cache=str(tiny_cache), batch=4 * world, workers=workers)
    seen = Counter[str]()
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        batches = [*stream(config, range(12 // world), rank, world)]
        assert [len(batch.keys) for batch in batches] == [4] * (12 // world)
        seen.update(key for batch in batches for key in batch.keys)
    assert len(seen) == 12
    assert set(seen.values()) == {4}  # rounds


@pytest.mark.parametrize("workers", [0, 1])
def test_every_rank_gets_the_same_number_of_batches(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """One rank has two of the three shards, the other one; a step has two micro-batches."""
    config = replace(SMALL, cache=str(tiny_cache), batch=10, workers=workers)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert [len(batch.keys) for batch in stream(config, range(5, 12), rank, 2)] == [3, 2] * 7


def test_a_run_repeats_itself_and_another_first_step_draws_another_order(tiny_cache: Path) -> None:
    config = replace(SMALL, cache=str(tiny_cache), workers=2)

    def order(first: int) -> list[tuple[tuple[str, ...], float]]:
        batches = stream(config, range(first, first + 6))
        return [(batch.keys, batch.photo.float().mean().item()) for batch in batches]

    one = order(0)
    assert order(0) == one
    assert [keys for keys, _ in order(9)] != [keys for keys, _ in one]
    shard = [key for keys, _ in one[:3] for key in keys]
    assert shard != sorted(shard)


def test_rounds_are_augmented_anew(tiny_cache: Path) -> None:
    photos: dict[str, list[Tensor]] = {}
    for batch in stream(replace(SMALL, cache=str(tiny_cache)), range(6)):
        for key, photo in zip(batch.keys, batch.photo, strict=True):
            photos.setdefault(key, []).append(photo)
    assert all(len(seen) == 2 and not seen[0].equal(seen[1]) for seen in photos.values())


def test_the_pipeline_can_go_to_a_process_that_is_spawned(tiny_cache: Path) -> None:
    config = replace(SMALL, cache=str(tiny_cache))
    loader = make_loader(config, open_caches(config), Share(seed=3, steps=range(3)))
    batch = next(iter(pickle.loads(pickle.dumps(loader.dataset))))
    assert batch.keys == next(iter(loader)).keys


def test_loader_processes_read_over_http(served: str) -> None:
    config = replace(SMALL, cache=served, workers=2)
    seen = {key for batch in islice(stream(config), 9) for key in batch.keys}
    assert len(seen) == 12


def test_a_url_needs_the_stream_reader(served: str) -> None:
    with pytest.raises(InputError, match=r"data\.reader=stream"):
        stream(replace(SMALL, cache=served, reader="indexed"))


def test_a_cut_shard_is_refused(cache: Path) -> None:
    for tar in cache.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(InputError, match="the index says"):
        next(stream(replace(SMALL, cache=str(cache))))


def test_more_readers_than_shards_are_refused(tiny_cache: Path) -> None:
    config = replace(SMALL, cache=str(tiny_cache))
    with pytest.raises(InputError, match=r"3 shards for 4 readers.*data\.workers"):
        stream(config, world=4)


def test_a_rank_that_the_environment_does_not_know_is_refused(tiny_cache: Path) -> None:
    config = replace(SMALL, cache=str(tiny_cache))
    with pytest.raises(InputError, match=r"rank 1 of 2, but the environment says 0 of 1"):
        stream(config, rank=1, world=2)
