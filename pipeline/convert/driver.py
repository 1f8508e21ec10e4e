"""Writes a source as a dataset in COCO's layout: in several processes, and going on after a kill.

A journal beside the annotation file has a row an image, with a mark of its inputs: what is there
and unchanged is not drawn again. The annotation file is written last, in the order of the
source, so a kill leaves no trace in the bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from panoptic_cache.pipeline.base.config import decode_json, fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, no_links, stamp, write_file
from panoptic_cache.pipeline.base.process import Interrupted, map_in_order
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.coco import CocoLayout, Rejection, sort_rejections
from panoptic_cache.pipeline.convert.image import Outcome, convert_image
from panoptic_cache.pipeline.convert.source import Item, Source

log = logging.getLogger(__name__)


def convert(
    source: Source, root: Path, split: str, *, workers: int, copy: bool, upright: bool
) -> dict[str, Any]:
    """Writes a split of a dataset, or what is missing of it; returns what `--json` prints.

    Other splits may lie in `root`. With `copy` photos are not linked; with `upright` they are
    annotated as their EXIF tags turn them. InputError where something else lies there, or it cannot
    be written.
    """
    start = time.monotonic()
    if not split or split.startswith(".") or "/" in split:
        raise InputError("a split's name has no / and no leading dot", where=f"--split {split}")
    if not source.items and not source.left_out:
        raise InputError("no image to convert", where=source.settings.get("format", ""))
    annotations = root.absolute() / "annotations"
    pngs = annotations / f"panoptic_{split}"
    layout = CocoLayout(root.absolute() / split, annotations / f"{pngs.name}.json", pngs)
    journal = annotations / f"convert_{split}.jsonl"
    quarantine = annotations / f"quarantine_{split}.jsonl"
    settings = {**source.settings, "categories": source.categories, "copy": copy}
    settings |= {"upright": True} if upright else {}
    head = json.dumps({"settings": settings, "fingerprint": fingerprint(settings)}).encode()
    items, shared = _distinct(source)
    before = _read_journal(journal, layout, head)
    for folder in (layout.images, pngs):
        Storage(str(folder)).create()
    with Storage(str(annotations)).locked():
        marked = [(item, png, _mark(item)) for item, png in items]
        done = {
            item.name: before[item.name]
            for item, png, mark in marked
            if item.name in before and before[item.name].stands(mark, layout, png)
        }
        todo = [each for each in marked if each[0].name not in done]
        if todo:
            layout.panoptic_json.unlink(missing_ok=True)  # it says that the split is finished
        _write_lines(journal, [head, *map(msgspec.json.encode, done.values())])
        isthing = {row["id"]: bool(row["isthing"]) for row in source.categories}
        work = partial(convert_image, layout=layout, copy=copy, upright=upright, isthing=isthing)
        try:
            with (
                progress("convert", len(items), "images", len(done)) as advance,
                open(journal, "ab", opener=no_links) as rows,
            ):
                for outcome in map_in_order(work, todo, workers):
                    done[outcome.name] = outcome
                    rows.write(msgspec.json.encode(outcome) + b"\n")
                    rows.flush()
                    advance()
        except Interrupted as stop:
            stop.advice = f"{len(done)} images are done, run the same command to go on"
            raise
        outcomes = [done[item.name] for item, _ in items]
        _write_lines(journal, [head, *map(msgspec.json.encode, outcomes)])
        during = [outcome.left_out for outcome in outcomes if outcome.left_out]
        left_out = sort_rejections([*source.left_out, *shared, *during])
        _write_lines(quarantine, (json.dumps(asdict(each)).encode() for each in left_out))
        images = [outcome.image for outcome in outcomes if outcome.image]
        annotated = [outcome.annotation for outcome in outcomes if outcome.annotation]
        document = {
            "info": {"description": f"converted from {source.settings.get('format')}"},
            "licenses": [],
            "categories": source.categories,
            "images": images,
            "annotations": annotated,
        }
        write_file(layout.panoptic_json, json.dumps(document, separators=(",", ":")).encode())

    mended = Counter(code for outcome in outcomes for code in outcome.mended)
    for code, count in sorted(mended.items()):
        log.warning("mended: %s, %d times", code, count)
    for code, count in sorted(Counter(each.code for each in left_out).items()):
        first = next(each for each in left_out if each.code == code)
        log.warning(
            "left out: %s, %d images, see %s; the first: %s: %s",
            *(code, count, quarantine, first.file, first.message),
        )
    names = {row["id"]: str(row["name"]) for row in source.categories}
    found = Counter(
        names[row["category_id"]] for each in annotated for row in each["segments_info"]
    )
    return {
        "images": len(images) + len(left_out),  # Of the source
        "written": len(images),
        "quarantined": len(left_out),
        "segments": {name: found[name] for name in names.values()},
        "pixels": sum(image["height"] * image["width"] for image in images),  # Of those written
        "unlabelled": sum(outcome.unlabelled for outcome in outcomes),  # Pixels
        "overlaps": sum(outcome.overlaps for outcome in outcomes),  # The same
        "seconds": round(time.monotonic() - start, 3),  # Of this run
    }


def _distinct(source: Source) -> tuple[list[tuple[Item, str]], list[Rejection]]:
    """The images and the names of their PNGs; the others share an id or a photo, or lead out."""
    ids = Counter(str(item.image_id) for item in source.items)
    photos = Counter(item.name for item in source.items)
    named = (PurePosixPath(item.name) for item in source.items)
    stems = Counter(place.with_suffix("") for place in named if place.name)
    items, shared = [], []
    for item in source.items:
        place = PurePosixPath(item.name)
        problem, code = "", "image-duplicate"
        if place.is_absolute() or ".." in place.parts or not place.name:
            problem, code = "its name leads out of the dataset", "file-outside"
        elif ids[str(item.image_id)] > 1:
            problem = "another image has this id, too"
        elif photos[item.name] > 1:
            problem = "another image has this photo, too"
        if problem:
            shared.append(Rejection(item.image_id, item.name, code, problem))
        else:
            stem = place.with_suffix("")
            items.append((item, f"{stem if stems[stem] == 1 else place}.png"))
    return items, shared


def _mark(item: Item) -> str:
    """A hash of the size and time of every input; of a missing one, too."""
    files = (item.photo, *item.inputs)
    return fingerprint(
        [item.mark, str(item.image_id), [str(file) for file in files], stamp(*files)]
    )


def _read_journal(journal: Path, layout: CocoLayout, head: bytes) -> dict[str, Outcome]:
    """The rows of an earlier run, by name; InputError where it was of other settings."""
    problem, where, remedy = "", journal, "choose another --out or --split"
    rows: list[bytes] = []
    try:
        first, *rows = journal.read_bytes().split(b"\n")
        if first != head:
            problem = "was begun with other settings or categories"
            remedy += ", or remove this one's files"
    except FileNotFoundError:
        for place in (layout.panoptic_json, layout.panoptic_dir, layout.images):
            if place.is_file() or any(place.glob("[!.]*")):
                problem, where = "holds something that was not converted here", place
                break
    if problem:
        raise InputError(problem, where=where, remedy=remedy, code="folder-taken")
    found = {}
    for row in rows:
        with suppress(ValueError):  # the last row of a killed run
            outcome = decode_json(row, Outcome)
            found[outcome.name] = outcome
    return found


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    write_file(path, b"".join(line + b"\n" for line in lines))
