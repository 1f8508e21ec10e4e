"""The inputs of finished shards, noted until a cache is whole: what changed since is made anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TextIO

from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.base.files import Storage, no_links, stamp
from panoptic_cache.pipeline.render.plan import ShardPlan

INPUTS_NAME = "inputs.jsonl"


def input_mark(shard: ShardPlan) -> str:
    """Differs once the size or the time of a photo or PNG of a shard has changed."""
    return fingerprint([stamp(record.photo, record.png) for record in shard.records])


def unchanged(storage: Storage, shards: Iterable[ShardPlan]) -> set[str]:
    """The names of the shards whose inputs are as they were noted, or were never noted at all.

    A finished cache has no notes, nor has one that an earlier version began, or a remote place.
    """
    shards = [*shards]
    marks = _read(storage)
    if marks is None:
        return {shard.name for shard in shards}
    with ThreadPoolExecutor(16) as pool:  # on a network disk, each answer takes its time
        now = pool.map(lambda shard: marks.get(shard.name) and input_mark(shard), shards)
        return {
            shard.name
            for shard, mark in zip(shards, now, strict=True)
            if mark is not None and marks[shard.name] in {mark, "unknown"}
        }


def _read(storage: Storage) -> dict[str, str] | None:
    """Mark by shard, or None where there are no notes; damaged lines are dropped."""
    if storage.local is None:
        return None
    try:
        lines = storage.read(INPUTS_NAME).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    marks = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            marks[str(row["shard"])] = str(row["inputs"])
    return marks


class Notes:
    """Writes the mark of each shard as it is finished."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def add(self, name: str, mark: str) -> None:
        """Notes one shard."""
        if self._file is not None:
            self._file.write(json.dumps({"shard": name, "inputs": mark}) + "\n")
            self._file.flush()


@contextmanager
def noted(storage: Storage, done: Mapping[str, object]) -> Iterator[Notes]:
    """Notes for the time of a run; those of the shards that are done already are kept."""
    if storage.local is None:
        yield Notes(None)
        return
    marks = _read(storage) or {}
    path = storage.local / INPUTS_NAME
    with open(path, "w", encoding="utf-8", opener=no_links) as file:
        notes = Notes(file)
        for name in done:
            notes.add(name, marks.get(name, "unknown"))
        yield notes
