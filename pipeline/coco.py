"""COCO panoptic annotations -> one `PanopticRecord` an image, joined by image id and cross-checked.

Nothing here knows the number of categories, the size of a split or COCO's ids: any folder in COCO
panoptic format will do. What is wrong with one image never stops the others; it becomes a
`Rejection`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from panoptic_cache.pipeline.base.collector import collector_paused
from panoptic_cache.pipeline.base.errors import InputError

ImageId = int | str

MAX_KEY_BYTES = 80
"""A tar header has 100 bytes for a member's name, and the key is followed by a suffix."""


@dataclass(frozen=True, slots=True)
class Category:
    """A category of the annotation file.

    Attributes:
        id: As annotated.
        name: As annotated.
        isthing: Has instances; stuff has none.
        label: 0..C-1 in the order of ascending ids; what the network predicts.
    """

    id: int
    name: str
    isthing: bool
    label: int


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A row of `segments_info`. Area and box are not trusted: the PNG decides."""

    id: int
    category_id: int
    iscrowd: bool
    area: int | None = None
    bbox: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class PanopticRecord:
    """One annotated image.

    Attributes:
        image_id: As annotated.
        key: The sample's name in a shard: the id in 12 digits, or the file's stem without dots.
        file_name: Of the photo, relative to the folder of photos.
        photo: Path of the photo.
        png: Path of the panoptic PNG.
        height: Pixels, as the JSON says.
        width: Pixels, as the JSON says.
        segments: The annotated segments.
    """

    image_id: ImageId
    key: str
    file_name: str
    photo: Path
    png: Path
    height: int
    width: int
    segments: tuple[SegmentInfo, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why one image is left out; a line of `quarantine.jsonl`."""

    image_id: ImageId
    file: str
    code: str
    message: str

    @classmethod
    def of(cls, image_id: ImageId, file_name: str, error: InputError) -> Rejection:
        """From an error; folders are left out, for a cache's bytes do not depend on them."""
        place = f"{Path(error.where).name}: " if error.where else ""
        remedy = f" ({error.remedy})" if error.remedy else ""
        return cls(image_id, file_name, error.code, f"{place}{error.what}{remedy}")


@dataclass(frozen=True, slots=True)
class CocoLayout:
    """Where a split of a COCO panoptic dataset lies.

    Attributes:
        images: Folder of photos.
        panoptic_json: The annotation file.
        panoptic_dir: Folder of panoptic PNGs.
    """

    images: Path
    panoptic_json: Path
    panoptic_dir: Path

    @classmethod
    def of(cls, root: Path, split: str) -> CocoLayout:
        """COCO's own layout: `ROOT/SPLIT`, `ROOT/annotations/panoptic_SPLIT[.json]`."""
        annotations = root / "annotations"
        if not root.is_dir():
            raise InputError("no such folder", where=root, remedy="give the root of the dataset")
        layout = cls(
            root / split,
            annotations / f"panoptic_{split}.json",
            annotations / f"panoptic_{split}",
        )
        if not layout.panoptic_json.is_file():
            known = sorted(
                p.stem.removeprefix("panoptic_") for p in annotations.glob("panoptic_*.json")
            )
            remedy = f"splits here: {', '.join(known)}" if known else "no split lies here"
            raise InputError(f"no split {split}", where=layout.panoptic_json, remedy=remedy)
        return layout

    def absolute(self) -> CocoLayout:
        """The same for whoever works in another folder, such as a Dask worker."""
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
    """A whole split.

    Attributes:
        categories: By label.
        records: The images that can be tried, by ascending key.
        rejections: The images that cannot, by ascending id.
        digest: SHA-256 of the annotation file.
    """

    categories: tuple[Category, ...]
    records: tuple[PanopticRecord, ...]
    rejections: tuple[Rejection, ...]
    digest: str

    def head(self, limit: int | None) -> CocoPanoptic:
        """The first `limit` records, or all; without rejections, if limited."""
        if limit is None:
            return self
        return replace(self, records=self.records[:limit], rejections=())


def read_dataset(layout: CocoLayout) -> CocoPanoptic:
    """Reads a split and joins images with annotations by image id, never by position.

    Raises:
        InputError: A folder or file is missing, or the JSON is not a panoptic annotation file.
    """
    # Imported here: scoring needs the classes above, soon, and no dataset.
    import hashlib  # noqa: PLC0415

    layout = layout.absolute()
    layout.check()
    source = layout.panoptic_json
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with collector_paused():
            content = _parse(source)
            categories = read_categories(content["categories"], source)
            images, annotations = content["images"], content["annotations"]
            return _join(layout, categories, images, annotations, digest)
    except OSError as error:
        raise InputError(
            f"cannot read: {error.strerror}", where=error.filename or source, code="unreadable"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"not a COCO panoptic annotation file: {type(error).__name__} {error}",
            where=source,
            remedy="it needs images, annotations with segments_info, and categories",
        ) from None


def _parse(source: Path) -> dict[str, Any]:
    """The annotation file, with segments in their final form where that is possible.

    COCO's largest file has 360 MB and 1.3 million segments. Making them while parsing means that
    their dicts, three times as large, are never there together.
    """
    data = source.read_bytes()
    text = data.decode(json.detect_encoding(data), "surrogatepass")
    del data
    content: dict[str, Any] = json.loads(text, object_hook=_segment_or_row)
    return content


def _segment_or_row(row: dict[str, Any]) -> dict[str, Any] | SegmentInfo:
    if "category_id" not in row or "file_name" in row:
        return row
    try:
        return _segment(row)
    except (KeyError, TypeError, ValueError, OverflowError):  # JSON may hold Infinity
        return row  # the image it belongs to will be named


def _segment(row: dict[str, Any]) -> SegmentInfo:
    box = row.get("bbox")
    return SegmentInfo(
        int(row["id"]),
        int(row["category_id"]),
        flag(row.get("iscrowd", 0), "iscrowd"),
        row.get("area"),
        tuple(box) if box is not None else None,
    )


def flag(value: object, name: str) -> bool:
    """0 or 1 as JSON has it; ValueError for anything else, for text is true whatever it says."""
    if isinstance(value, int | float) and value in {0, 1}:
        return value == 1
    raise ValueError(f"{name} is {value!r}, not 0 or 1")


def is_area(value: object) -> bool:
    """Whether a value is a number of pixels."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < 1 << 62 and value == int(value)


def read_categories(rows: list[dict[str, Any]], source: Path) -> tuple[Category, ...]:
    """The categories by label, which is the rank of the id.

    Raises:
        InputError: Two categories share an id, or there is none.
    """
    ids = [int(row["id"]) for row in rows]
    if not ids or len(set(ids)) < len(ids):
        raise InputError("categories are empty or share an id", where=source)
    return tuple(
        Category(int(row["id"]), str(row["name"]), flag(row["isthing"], "isthing"), label)
        for label, row in enumerate(sorted(rows, key=lambda row: int(row["id"])))
    )


def _join(
    layout: CocoLayout,
    categories: tuple[Category, ...],
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    digest: str,
) -> CocoPanoptic:
    # One listing of each folder: a stat for every image takes minutes on a network disk.
    photos, pngs = _names(layout.images), _names(layout.panoptic_dir)
    known = {category.id for category in categories}
    if any(isinstance(row, SegmentInfo) for row in annotations):
        raise ValueError("annotations of single instances")  # as in instances_*.json
    rejections = [
        Rejection("", str(row.get("file_name", "")), "annotation-malformed", f"has no {name}")
        for rows, name in ((images, "id"), (annotations, "image_id"))
        for row in rows
        if name not in row
    ]
    images = [row for row in images if "id" in row]
    annotations = [row for row in annotations if "image_id" in row]
    by_image = {annotation["image_id"]: annotation for annotation in annotations}
    times = Counter(image["id"] for image in images)
    times_annotated = Counter(annotation["image_id"] for annotation in annotations)
    records: list[PanopticRecord] = []
    for image in images:
        annotation = by_image.get(image["id"])
        try:
            if annotation is None:
                raise InputError("has no annotation", code="annotation-missing")
            if times[image["id"]] > 1 or times_annotated[image["id"]] > 1:
                raise InputError("is listed more than once", code="image-duplicate")
            record = _record(layout, image, annotation)
            _check_record(record, known)
            if record.file_name not in photos and not is_file(record.photo):
                raise InputError("photo missing", where=record.photo, code="photo-missing")
            if annotation["file_name"] not in pngs and not is_file(record.png):
                raise InputError("panoptic PNG missing", where=record.png, code="png-missing")
            records.append(record)
        except InputError as error:
            file = str(image.get("file_name", ""))
            rejections.append(Rejection.of(image["id"], file, error))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            file = str(image.get("file_name", ""))
            message = f"malformed annotation: {type(error).__name__} {error}"
            rejections.append(Rejection(image["id"], file, "annotation-malformed", message))
    for image_id in times_annotated.keys() - times.keys():
        file = str(by_image[image_id].get("file_name", ""))
        message = "annotation of an image that the file does not list"
        rejections.append(Rejection(image_id, file, "image-missing", message))
    _reject_shared_keys(records, rejections)
    records.sort(key=lambda record: record.key)
    rejections.sort(key=lambda rejection: (str(rejection.image_id).zfill(12), rejection.code))
    return CocoPanoptic(categories, tuple(records), tuple(rejections), digest)


def is_file(path: Path) -> bool:
    """Whether a file is there; not so where no file can have that name."""
    try:
        return path.is_file()
    except OSError:
        return False


def _names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def sample_key(image_id: ImageId, file_name: str) -> str:
    """A key without dots: webdataset splits a member's name at its first one."""
    if isinstance(image_id, int):
        return f"{image_id:012d}"
    return Path(file_name).stem.replace(".", "_")


def _record(
    layout: CocoLayout, image: dict[str, Any], annotation: dict[str, Any]
) -> PanopticRecord:
    return PanopticRecord(
        image_id=image["id"],
        key=sample_key(image["id"], image["file_name"]),
        file_name=image["file_name"],
        photo=layout.images / image["file_name"],
        png=layout.panoptic_dir / annotation["file_name"],
        height=int(image["height"]),
        width=int(image["width"]),
        segments=tuple(
            row if isinstance(row, SegmentInfo) else _segment(row)
            for row in annotation["segments_info"]
        ),
    )


def _check_record(record: PanopticRecord, known: set[int]) -> None:
    # Names that came from undecodable bytes hold lone surrogates, which no tar header takes.
    plain = record.key.encode(errors="replace")
    if len(plain) > MAX_KEY_BYTES or plain.decode() != record.key:
        raise InputError(
            f"its name cannot be a key: more than {MAX_KEY_BYTES} bytes, or not UTF-8",
            remedy="give the photo another name",
            code="key-invalid",
        )
    seen: set[int] = set()
    for segment in record.segments:
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


def _reject_shared_keys(records: list[PanopticRecord], rejections: list[Rejection]) -> None:
    times = Counter(record.key for record in records)
    shared = [record for record in records if times[record.key] > 1]
    for record in shared:
        message = f"shares the key {record.key} with another image (rename one of the photos)"
        rejections.append(Rejection(record.image_id, record.file_name, "key-shared", message))
    if shared:
        records[:] = [record for record in records if times[record.key] == 1]
