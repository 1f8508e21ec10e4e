"""A split in COCO panoptic format -> one `PanopticRecord` an image, joined by id and checked.

Nothing here knows the number of categories, the size of a split or COCO's ids: any folder in COCO
panoptic format will do. What is wrong with one image never stops the others; it becomes a
`Rejection`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from panoptic_cache.pipeline.annotations import (
    AnnotationRow,
    ImageId,
    ImageRow,
    SegmentInfo,
    check_segments,
    loose_row,
    parse_categories,
    parse_row,
    read_rows,
    shape_error,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.folders import Folder
from panoptic_cache.pipeline.png import png_size, read_png

T = TypeVar("T")

MAX_KEY_BYTES = 80
"""A tar header has 100 bytes for a member's name, and the key is followed by a suffix."""

log = logging.getLogger(__name__)


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
    key: str  # The sample's name in a shard: see `sample_keys`
    file_name: str  # Of the photo, as annotated
    photo: Path  # Path of the photo
    png: Path  # Path of the panoptic PNG
    height: int  # Pixels, as the JSON says, or the PNG where it does not
    width: int  # The same
    segments: tuple[SegmentInfo, ...]  # The annotated segments
    merged: int = 0  # Rows that repeated the id of another
    bgr: bool = False  # The PNG's channels are swapped
    upright: bool = False  # The photo is turned as its EXIF orientation says


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
    """Where a split of a COCO panoptic dataset lies, and how it is read."""

    images: Path  # Folder of photos
    panoptic_json: Path  # The annotation file
    panoptic_dir: Path  # Folder of panoptic PNGs
    bgr: bool = False  # Red and blue of the PNGs are swapped
    upright: bool = False  # Annotations are drawn on photos turned as their EXIF orientation says
    follow_links: bool = False  # Links may lead out of the folders

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

    def check(self) -> None:
        """Raises InputError where a folder or the file is missing."""
        for folder, what in ((self.images, "photos"), (self.panoptic_dir, "panoptic PNGs")):
            if not folder.is_dir():
                raise InputError(f"no folder of {what}", where=folder, remedy="unpack it there")
        if not self.panoptic_json.exists():
            raise InputError("no annotation file", where=self.panoptic_json)


@dataclass(frozen=True, slots=True)
class CocoPanoptic:
    """A whole split."""

    categories: tuple[Category, ...]  # By label
    records: tuple[PanopticRecord, ...]  # The images that can be tried, by ascending key
    rejections: tuple[Rejection, ...]  # The images that cannot, by ascending id
    digest: str  # SHA-256 of the annotation file, and of how it is read where that is not as usual

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

    InputError where a folder or file is missing, or the JSON is no panoptic annotation file.
    """
    import hashlib  # noqa: PLC0415 (5 ms, which scoring does without)

    layout.check()
    content, data = read_rows(layout.panoptic_json)
    categories = read_categories(content.categories, layout.panoptic_json)
    rejections: list[Rejection] = []
    try:
        annotations = _by_id(content.annotations, AnnotationRow, "image_id", rejections)
        if content.images is None:
            log.warning("%s has no `images`: photos are found by their PNGs", layout.panoptic_json)
            images: dict[ImageId, list[ImageRow | _BadRow]] = {
                image_id: [ImageRow(image_id, row.file_name) for row in rows]
                for image_id, rows in annotations.items()
            }
        else:
            images = _by_id(content.images, ImageRow, "id", rejections)
    except ValueError as error:
        raise shape_error(f"is no annotation file: {error}", layout.panoptic_json) from None
    if images.keys().isdisjoint(annotations):  # numbers in one list, text in the other
        own = {str(image_id): image_id for image_id in images}
        if own.keys() & {str(image_id) for image_id in annotations}:
            log.warning("image ids are text in one list, numbers in the other: taken as the same")
        annotations = {own.get(str(image_id), image_id): r for image_id, r in annotations.items()}
    known = {category.id for category in categories}
    records = sample_keys(_join(layout, known, images, annotations, rejections), rejections)
    _warn_of_stuff(categories, records)
    digest = hashlib.sha256(data).hexdigest()
    for name in ("bgr", "upright"):
        digest += f" {name}" if getattr(layout, name) else ""
    records.sort(key=lambda record: record.key)
    return CocoPanoptic(categories, tuple(records), sort_rejections(rejections), digest)


def read_categories(rows: Iterable[Any] | None, source: Path) -> tuple[Category, ...]:
    """The categories by label, which is the rank of the id; InputError where a row is malformed."""
    return tuple(
        Category(row.id, str(row.name), bool(row.isthing), label)
        for label, row in enumerate(parse_categories(rows, source))
    )


def _warn_of_stuff(categories: Sequence[Category], records: Iterable[PanopticRecord]) -> None:
    """Some tools write `isthing` as 0 everywhere, also of what they have drawn one by one."""
    if any(category.isthing for category in categories):
        return
    for record in records:
        times = Counter(segment.category_id for segment in record.segments)
        for category in categories:
            if times[category.id] > 1:
                log.warning(
                    "no category has `isthing` 1, but image %s has %d segments of %s: set it to 1"
                    " where things are counted one by one",
                    *(record.image_id, times[category.id], category.name),
                )
                return


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
    photos = Folder(layout.images, "photo", follow_links=layout.follow_links)
    pngs = Folder(layout.panoptic_dir, "panoptic PNG", follow_links=layout.follow_links)
    for folder, names in (
        (photos, [image.file_name for rows in images.values() for image in rows]),
        (pngs, [row.file_name for rows in annotations.values() for row in rows]),
    ):
        if missing := folder.guess(names):
            first = folder.path / missing[0]
            log.warning("%d of %d files are missing, such as %s", len(missing), len(names), first)
    records = []
    for image_id, rows in images.items():
        annotated = annotations.pop(image_id, [])
        for image in rows:
            try:
                if not annotated:
                    raise InputError("has no annotation", code="annotation-missing")
                if len(rows) > 1 or len(annotated) > 1:
                    raise InputError("is listed more than once", code="image-duplicate")
                records.append(_record(image, annotated[0], known, layout, (photos, pngs)))
            except InputError as error:
                rejections.append(Rejection.of(image_id, image.file_name, error))
    message = "annotation of an image that the file does not list"
    rejections += [
        Rejection(image_id, annotated[0].file_name, "image-missing", message)
        for image_id, annotated in annotations.items()
    ]
    return records


def _record(
    image: ImageRow | _BadRow,
    annotation: AnnotationRow | _BadRow,
    known: set[int],
    layout: CocoLayout,
    folders: tuple[Folder, Folder],
) -> PanopticRecord:
    """One image with its segments; InputError where it cannot be rendered."""
    for row in (image, annotation):
        if isinstance(row, _BadRow):
            raise InputError(row.problem, code="annotation-malformed")
    assert isinstance(image, ImageRow)
    assert isinstance(annotation, AnnotationRow)
    segments = check_segments(annotation.segments_info, known)
    photo, png = folders[0].find(image.file_name), folders[1].find(annotation.file_name)
    height, width = image.height, image.width
    if height is None or width is None:
        height, width = png_size(read_png(png))
    return PanopticRecord(
        image_id=image.id,
        key=sample_key(image.id, image.file_name),
        file_name=image.file_name,
        photo=photo,
        png=png,
        height=height,
        width=width,
        segments=segments,
        merged=len(annotation.segments_info) - len(segments),
        bgr=layout.bgr,
        upright=layout.upright,
    )


def sample_key(image_id: ImageId, file_name: str) -> str:
    """A key without dots: webdataset splits a member's name at its first one."""
    if isinstance(image_id, int):
        return f"{image_id:012d}"
    return Path(file_name).stem.replace(".", "_")


def longer_keys(image_id: ImageId, file_name: str) -> tuple[str, str]:
    """What stands for `sample_key` where photos of several folders have one stem."""
    whole = file_name.rpartition(".")[0]
    return re.sub(r"[./\\]", "_", str(image_id)), re.sub(r"[./\\]", "_", whole)


def sample_keys(records: list[PanopticRecord], rejections: list[Rejection]) -> list[PanopticRecord]:
    """The records with a key that none shares; adds those that get none to the rejections.

    Where photos of several folders have one stem, the key is the image id, else the whole path.
    """
    for place in range(2):
        times = Counter(record.key for record in records)
        records = [
            replace(one, key=longer_keys(one.image_id, one.file_name)[place])
            if times[one.key] > 1
            else one
            for one in records
        ]
    kept = []
    times = Counter(record.key for record in records)
    for record in records:
        key, name = record.key, record.file_name
        # Names that came from undecodable bytes hold lone surrogates, which no tar header takes.
        plain = key.encode(errors="replace")
        if len(plain) > MAX_KEY_BYTES or plain.decode() != key:
            message = (
                f"its name cannot be a key: more than {MAX_KEY_BYTES} bytes, or not UTF-8 (give the"
                " photo another name)"
            )
            rejections.append(Rejection(record.image_id, name, "key-invalid", message))
        elif times[key] > 1:
            message = f"shares the key {key} with another image (rename one of the photos)"
            rejections.append(Rejection(record.image_id, name, "key-shared", message))
        else:
            kept.append(record)
    return kept
