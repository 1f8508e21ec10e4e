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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from panoptic_cache.pipeline.base.config import decode_json, fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, no_links, write_file
from panoptic_cache.pipeline.base.process import Interrupted, map_in_order
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.coco import CocoLayout, Rejection, sort_rejections
from panoptic_cache.pipeline.convert.files import without_suffix
from panoptic_cache.pipeline.convert.image import Job, Outcome, convert_image, make_folder
from panoptic_cache.pipeline.convert.source import Item, Source
from panoptic_cache.pipeline.folders import is_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """The outcome, as `convert --json` prints it."""

    images: int  # Of the source
    written: int  # In the new dataset
    quarantined: int  # Images left out
    segments: dict[str, int]  # By category
    pixels: int  # Of all images written
    unlabelled: int  # Of those pixels
    overlaps: int  # Pixels that more than one instance claimed
    seconds: float  # This run took


def convert(
    source: Source,
    root: Path,
    split: str,
    *,
    workers: int = 1,
    copy: bool = False,
    upright: bool = False,
) -> ConvertResult:
    """Writes a split of a dataset, or what is missing of it.

    Args:
        source: From a format.
        root: Of the dataset; other splits may lie there.
        split: Its name.
        workers: Processes; 0 or 1: only this one.
        copy: Copies photos instead of linking them.
        upright: Photos are annotated as their EXIF tag turns them.

    Raises:
        InputError: Something else lies there, or it cannot be written.
    """
    start = time.monotonic()
    if not split or split.startswith(".") or "/" in split:
        raise InputError("a split's name has no / and no leading dot", where=f"--split {split}")
    if not source.items and not source.left_out:
        raise InputError("no image to convert", where=source.settings.get("format", ""))
    annotations = root.absolute() / "annotations"
    pngs = annotations / f"panoptic_{split}"
    layout = CocoLayout(root.absolute() / split, annotations / f"{pngs.name}.json", pngs)
    isthing = {row["id"]: bool(row["isthing"]) for row in source.categories}
    items, shared = _distinct(source)
    journal = annotations / f"convert_{split}.jsonl"
    head = {**source.settings, "categories": source.categories, "copy": copy}
    head |= {"upright": True} if upright else {}
    before = _read_journal(journal, layout, head)
    for folder in (layout.images, pngs):
        make_folder(folder)
    with Storage(str(annotations)).locked():
        marked = [(item, png, _mark(item)) for item, png in items]
        done = {
            item.name: before[item.name]
            for item, png, mark in marked
            if _is_done(before.get(item.name), mark, layout, png)
        }
        todo = [each for each in marked if each[0].name not in done]
        if todo:
            layout.panoptic_json.unlink(missing_ok=True)  # it says that the split is finished
        _write_journal(journal, head, done.values())
        try:
            with (
                progress("convert", len(items), "images", len(done)) as advance,
                open(journal, "ab", opener=no_links) as rows,
            ):
                work = partial(convert_image, job=Job(layout, copy, upright, isthing))
                for outcome in map_in_order(work, todo, workers):
                    done[outcome.name] = outcome
                    rows.write(msgspec.json.encode(outcome) + b"\n")
                    rows.flush()
                    advance()
        except Interrupted as stop:
            stop.advice = f"{len(done)} images are done, run the same command to go on"
            raise
        outcomes = [done[item.name] for item, _ in items]
        _write_journal(journal, head, outcomes)
        during = [outcome.left_out for outcome in outcomes if outcome.left_out]
        left_out = sort_rejections([*source.left_out, *shared, *during])
        lines = "".join(f"{json.dumps(asdict(rejection))}\n" for rejection in left_out)
        write_file(annotations / f"quarantine_{split}.jsonl", lines.encode())
        document = {
            "info": {"description": f"converted from {source.settings.get('format')}"},
            "licenses": [],
            "categories": source.categories,
            "images": [outcome.image for outcome in outcomes if outcome.image],
            "annotations": [outcome.annotation for outcome in outcomes if outcome.annotation],
        }
        data = json.dumps(document, separators=(",", ":")).encode()
        write_file(layout.panoptic_json, data)
    _report(outcomes, left_out, annotations / f"quarantine_{split}.jsonl")
    return _summary(source, outcomes, left_out, time.monotonic() - start)


def _distinct(source: Source) -> tuple[list[tuple[Item, str]], list[Rejection]]:
    """The images and the names of their PNGs; the others share an id or a photo, or lead out."""
    ids = Counter(str(item.image_id) for item in source.items)
    photos = Counter(item.name for item in source.items)
    stems = Counter(without_suffix(item.name) for item in source.items)
    items, shared = [], []
    for item in source.items:
        place = PurePosixPath(item.name)
        if place.is_absolute() or ".." in place.parts or not place.name:
            message = "its name leads out of the dataset"
            shared.append(Rejection(item.image_id, item.name, "file-outside", message))
            continue
        if ids[str(item.image_id)] > 1 or photos[item.name] > 1:
            what = "id" if ids[str(item.image_id)] > 1 else "photo"
            message = f"another image has this {what}, too"
            shared.append(Rejection(item.image_id, item.name, "image-duplicate", message))
            continue
        stem = without_suffix(item.name)
        items.append((item, f"{stem if stems[stem] == 1 else item.name}.png"))
    return items, shared


def _mark(item: Item) -> str:
    """A hash of the size and time of every input; of a missing one, too."""
    rows: list[object] = [item.mark, str(item.image_id)]
    for path in (item.photo, *item.inputs):
        try:
            state = path.stat()
            rows.append((str(path), state.st_size, state.st_mtime_ns))
        except OSError:
            rows.append(str(path))
    return fingerprint(rows)


def _is_done(outcome: Outcome | None, mark: str, layout: CocoLayout, png: str) -> bool:
    if outcome is None or outcome.mark != mark:
        return False
    files = (layout.images / outcome.name, layout.panoptic_dir / png)
    return outcome.left_out is not None or all(map(is_file, files))


def _read_journal(journal: Path, layout: CocoLayout, head: dict[str, Any]) -> dict[str, Outcome]:
    """The rows of an earlier run, by name; InputError where it was of other settings."""
    try:
        first, *rows = journal.read_bytes().split(b"\n")
    except FileNotFoundError:
        for place in (layout.panoptic_json, layout.panoptic_dir, layout.images):
            if place.is_file() or any(place.glob("[!.]*")):
                raise InputError(
                    "holds something that was not converted here",
                    where=place,
                    remedy="choose another --out or --split",
                    code="folder-taken",
                ) from None
        return {}
    if first != _head(head):
        raise InputError(
            "was begun with other settings or categories",
            where=journal,
            remedy="choose another --out or --split, or remove this one's files",
            code="folder-taken",
        )
    found = {}
    for row in rows:
        with suppress(ValueError):  # the last row of a killed run
            outcome = decode_json(row, Outcome)
            found[outcome.name] = outcome
    return found


def _write_journal(journal: Path, head: dict[str, Any], outcomes: Iterable[Outcome]) -> None:
    rows = [_head(head), *(msgspec.json.encode(outcome) for outcome in outcomes)]
    write_file(journal, b"\n".join(rows) + b"\n")


def _head(head: dict[str, Any]) -> bytes:
    return json.dumps({"settings": head, "fingerprint": fingerprint(head)}).encode()


def _report(outcomes: list[Outcome], left_out: Sequence[Rejection], place: Path) -> None:
    """Says what was passed over and what was left out, by reason."""
    mended = Counter(code for outcome in outcomes for code in outcome.mended)
    for code, count in sorted(mended.items()):
        log.warning("mended: %s, %d times", code, count)
    reasons = Counter(rejection.code for rejection in left_out)
    for code, count in sorted(reasons.items()):
        first = next(one for one in left_out if one.code == code)
        log.warning(
            "left out: %s, %d images, see %s; the first: %s: %s",
            code,
            count,
            place,
            first.file,
            first.message,
        )


def _summary(
    source: Source, outcomes: list[Outcome], left_out: Sequence[Rejection], seconds: float
) -> ConvertResult:
    names = {row["id"]: str(row["name"]) for row in source.categories}
    segments = dict.fromkeys(names.values(), 0)
    for outcome in outcomes:
        for segment in (outcome.annotation or {}).get("segments_info", ()):
            segments[names[segment["category_id"]]] += 1
    written = [outcome.image for outcome in outcomes if outcome.image]
    return ConvertResult(
        images=len(written) + len(left_out),
        written=len(written),
        quarantined=len(left_out),
        segments=segments,
        pixels=sum(image["height"] * image["width"] for image in written),
        unlabelled=sum(outcome.unlabelled for outcome in outcomes),
        overlaps=sum(outcome.overlaps for outcome in outcomes),
        seconds=round(seconds, 3),
    )
