"""A split in COCO panoptic format -> one `PanopticRecord` an image, joined by id and checked.

Nothing here knows the number of categories, the size of a split or COCO's ids: any folder in COCO
panoptic format will do. What is wrong with one image never stops the others; it becomes a
`Rejection`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from panoptic_cache.pipeline.annotations import (
    AnnotationRow,
    CategoryRow,
    ImageId,
    ImageRow,
    SegmentInfo,
    loose_row,
    parse_file,
    parse_row,
)
from panoptic_cache.pipeline.base.errors import InputError

T = TypeVar("T")

MAX_KEY_BYTES = 80
"""A tar header has 100 bytes for a member's name, and the key is followed by a suffix."""


@dataclass(frozen=True, slots=True)
class Category:
    """A category of the annotation file."""

    id: int  # As annotated
    name: str  # As annotated
    isthing: bool  # Has instances; stuff has none
    label: int  # 0..C-1 in the order of ascending ids; what the network predicts


@dataclass(frozen=True, slots=True)
class PanopticRecord:
    """One annotated image."""

    image_id: ImageId  # As annotated
    key: str  # The sample's name in a shard: the id in 12 digits, or the file's stem without dots
    file_name: str  # Of the photo, relative to the folder of photos
    photo: Path  # Path of the photo
    png: Path  # Path of the panoptic PNG
    height: int  # Pixels, as the JSON says
    width: int  # Pixels, as the JSON says
    segments: tuple[SegmentInfo, ...]  # The annotated segments


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why one image is left out; a line of `quarantine.jsonl`."""

    image_id: ImageId
    file: str
    code: str
    message: str

    @classmethod
    def of(cls, image_id: ImageId, file_name: str, error: InputError) -> Rejection:
        """From an error; without folders, as a cache's bytes must not depend on them."""
        place = f"{Path(error.where).name}: " if error.where else ""
        remedy = f" ({error.remedy})" if error.remedy else ""
        return cls(image_id, file_name, error.code, f"{place}{error.what}{remedy}")


def sort_rejections(rejections: Iterable[Rejection]) -> tuple[Rejection, ...]:
    """By ascending image id."""
    return tuple(sorted(rejections, key=lambda one: (str(one.image_id).zfill(12), one.code)))


@dataclass(frozen=True, slots=True)
class CocoLayout:
    """Where a split of a COCO panoptic dataset lies."""

    images: Path  # Folder of photos
    panoptic_json: Path  # The annotation file
    panoptic_dir: Path  # Folder of panoptic PNGs

    @classmethod
    def of(cls, root: Path, split: str) -> CocoLayout:
        """COCO's own layout: `ROOT/SPLIT`, `ROOT/annotations/panoptic_SPLIT[.json]`."""
        annotations = root / "annotations"
        if not root.is_dir():
            raise InputError("no such folder", where=root, remedy="give the root of the dataset")
        pngs = annotations / f"panoptic_{split}"
        layout = cls(root / split, annotations / f"{pngs.name}.json", pngs)
        if not layout.panoptic_json.is_file():
            known = sorted(
                p.stem.removeprefix("panoptic_") for p in annotations.glob("panoptic_*.json")
            )
            remedy = f"splits here: {', '.join(known)}" if known else "no split lies here"
            raise InputError(f"no split {split}", where=layout.panoptic_json, remedy=remedy)
        return layout

    def absolute(self) -> CocoLayout:
        """The same with absolute paths, for processes with another working directory."""
        return CocoLayout(
            self.images.absolute(), self.panoptic_json.absolute(), self.panoptic_dir.absolute()
        )

    def check(self) -> None:
        """Raises InputError where a folder or the file is missing."""
        for folder, what in ((self.images, "photos"), (self.panoptic_dir, "panoptic PNGs")):
            if not folder.is_dir():
                raise InputError(f"no folder of {what}", where=folder, remedy="unpack it there")
        if not self.panoptic_json.is_file():
            raise InputError("no annotation file", where=self.panoptic_json)


@dataclass(frozen=True, slots=True)
class CocoPanoptic:
    """A whole split."""

    categories: tuple[Category, ...]  # By label
    records: tuple[PanopticRecord, ...]  # The images that can be tried, by ascending key
    rejections: tuple[Rejection, ...]  # The images that cannot, by ascending id
    digest: str  # SHA-256 of the annotation file

    def spread(self, limit: int | None) -> CocoPanoptic:
        """`limit` records, evenly spread over the split, or all; without rejections, if limited.

        Neighbours by id are often of one place or one day, so the first ones say little of all.
        """
        if limit is None:
            return self
        count = len(self.records)
        places = [(2 * at + 1) * count // (2 * limit) for at in range(limit)]
        records = self.records if limit >= count else tuple(self.records[at] for at in places)
        return replace(self, records=records, rejections=())


def read_dataset(layout: CocoLayout) -> CocoPanoptic:
    """Reads a split and joins images with annotations by image id, never by position.

    Raises:
        InputError: A folder or file is missing, or the JSON is not a panoptic annotation file.
    """
    import hashlib  # noqa: PLC0415 (5 ms, which scoring does without)

    layout = layout.absolute()
    layout.check()
    source = layout.panoptic_json
    try:
        data = source.read_bytes()
        content = parse_file(data)
        if content.images is None or content.categories is None:
            raise ValueError("no images or no categories")
        categories = read_categories(content.categories, source)
        known = {category.id for category in categories}
        rejections: list[Rejection] = []
        images = _by_id(content.images, ImageRow, "id", rejections)
        annotations = _by_id(content.annotations, AnnotationRow, "image_id", rejections)
        records = _join(layout, known, images, annotations, rejections)
    except OSError as error:
        raise InputError(
            f"cannot read: {error.strerror}", where=error.filename or source, code="unreadable"
        ) from None
    except ValueError as error:
        raise InputError(
            f"not a COCO panoptic annotation file: {error}",
            where=source,
            remedy="it needs images, annotations with segments_info, and categories",
        ) from None
    records.sort(key=lambda record: record.key)
    digest = hashlib.sha256(data).hexdigest()
    return CocoPanoptic(categories, tuple(records), sort_rejections(rejections), digest)


def read_categories(rows: Iterable[Any], source: Path) -> tuple[Category, ...]:
    """The categories by label, which is the rank of the id.

    Raises:
        ValueError: A row is malformed.
        InputError: Two categories share an id, or there is none.
    """
    parsed = sorted((parse_row(row, CategoryRow) for row in rows), key=lambda row: row.id)
    if not parsed or len({row.id for row in parsed}) < len(parsed):
        raise InputError("categories are empty or share an id", where=source)
    return tuple(
        Category(row.id, str(row.name), bool(row.isthing), label)
        for label, row in enumerate(parsed)
    )


class _BadRow(NamedTuple):
    file_name: str
    problem: str


def _by_id(
    rows: Iterable[Any], kind: type[T], key: str, rejections: list[Rejection]
) -> dict[ImageId, list[T | _BadRow]]:
    """Rows by image id; one without an id is only rejected."""
    found: dict[ImageId, list[T | _BadRow]] = defaultdict(list)
    for row in rows:
        try:
            parsed = parse_row(row, kind)
            found[getattr(parsed, key)].append(parsed)
        except ValueError as error:
            values = loose_row(row)
            if "category_id" in values and "segments_info" not in values:
                raise ValueError("it annotates single instances") from None
            name, image_id = str(values.get("file_name", "")), values.get(key)
            if isinstance(image_id, int | str):
                found[image_id].append(_BadRow(name, f"malformed annotation: {error}"))
            else:
                rejections.append(Rejection("", name, "annotation-malformed", f"has no {key}"))
    return found


def _join(
    layout: CocoLayout,
    known: set[int],
    images: Mapping[ImageId, Sequence[ImageRow | _BadRow]],
    annotations: dict[ImageId, list[AnnotationRow | _BadRow]],
    rejections: list[Rejection],
) -> list[PanopticRecord]:
    """The images that can be tried; adds the others to the rejections."""
    # One listing of each folder: a stat for every image takes minutes on a network disk.
    photos, pngs = list_names(layout.images), list_names(layout.panoptic_dir)
    records = []
    for image_id, rows in images.items():
        annotated = annotations.pop(image_id, [])
        for image in rows:
            try:
                if not annotated:
                    raise InputError("has no annotation", code="annotation-missing")
                if len(rows) > 1 or len(annotated) > 1:
                    raise InputError("is listed more than once", code="image-duplicate")
                record = _record(layout, image, annotated[0], known)
                if record.file_name not in photos and not is_file(record.photo):
                    raise InputError("photo missing", where=record.photo, code="photo-missing")
                if annotated[0].file_name not in pngs and not is_file(record.png):
                    raise InputError("panoptic PNG missing", where=record.png, code="png-missing")
                records.append(record)
            except InputError as error:
                rejections.append(Rejection.of(image_id, image.file_name, error))
    message = "annotation of an image that the file does not list"
    rejections += [
        Rejection(image_id, annotated[0].file_name, "image-missing", message)
        for image_id, annotated in annotations.items()
    ]
    times = Counter(record.key for record in records)
    for record in records:
        if times[record.key] > 1:
            message = f"shares the key {record.key} with another image (rename one of the photos)"
            rejections.append(Rejection(record.image_id, record.file_name, "key-shared", message))
    return [record for record in records if times[record.key] == 1]


def _record(
    layout: CocoLayout,
    image: ImageRow | _BadRow,
    annotation: AnnotationRow | _BadRow,
    known: set[int],
) -> PanopticRecord:
    """One image with its segments; InputError where it cannot be rendered."""
    if isinstance(image, _BadRow):
        raise InputError(image.problem, code="annotation-malformed")
    if isinstance(annotation, _BadRow):
        raise InputError(annotation.problem, code="annotation-malformed")
    key = sample_key(image.id, image.file_name)
    # Names that came from undecodable bytes hold lone surrogates, which no tar header takes.
    plain = key.encode(errors="replace")
    if len(plain) > MAX_KEY_BYTES or plain.decode() != key:
        raise InputError(
            f"its name cannot be a key: more than {MAX_KEY_BYTES} bytes, or not UTF-8",
            remedy="give the photo another name",
            code="key-invalid",
        )
    seen: set[int] = set()
    for segment in annotation.segments_info:
        if segment.id in seen:
            raise InputError(f"segment {segment.id} twice in the JSON", code="segment-duplicate")
        if not 0 < segment.id < 1 << 24:
            raise InputError(f"segment id {segment.id} is not in 1..2^24-1", code="segment-id")
        if segment.category_id not in known:
            raise InputError(
                f"segment {segment.id} has unknown category {segment.category_id}",
                code="category-unknown",
            )
        seen.add(segment.id)
    return PanopticRecord(
        image_id=image.id,
        key=key,
        file_name=image.file_name,
        photo=layout.images / image.file_name,
        png=layout.panoptic_dir / annotation.file_name,
        height=image.height,
        width=image.width,
        segments=annotation.segments_info,
    )


def sample_key(image_id: ImageId, file_name: str) -> str:
    """A key without dots: webdataset splits a member's name at its first one."""
    if isinstance(image_id, int):
        return f"{image_id:012d}"
    return Path(file_name).stem.replace(".", "_")


def list_names(folder: Path) -> set[str]:
    """The names of all files in a folder."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def is_file(path: Path) -> bool:
    """Whether a file is there; False for a name that no file can have."""
    with suppress(OSError):
        return path.is_file()
    return False
