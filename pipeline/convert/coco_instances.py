"""Instances in COCO's JSON, as COCO itself, CVAT, Roboflow, FiftyOne and others write it.

Stuff may come from a second such file, or from semantic maps, and lies below the instances. Crowds
lie between them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw, Struct

from panoptic_cache.pipeline.annotations import ImageId, loose_row, parse_file, parse_row
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import read_file
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.convert.coco_masks import Mask, read_segmentation
from panoptic_cache.pipeline.convert.files import Paths, pair_maps, walk
from panoptic_cache.pipeline.convert.semantic_maps import Classes, make_classes
from panoptic_cache.pipeline.convert.source import (
    Drawing,
    Item,
    Row,
    Size,
    Source,
    category,
    check_size,
    paint,
)
from panoptic_cache.pipeline.photo import SUFFIXES

log = logging.getLogger(__name__)


class _Image(Struct):
    id: ImageId
    file_name: str
    height: int | None = None
    width: int | None = None


class _Category(Struct):
    id: ImageId
    name: ImageId
    supercategory: ImageId | None = None
    isthing: Any = None


class _Annotation(Struct):
    image_id: ImageId
    category_id: ImageId
    segmentation: Any = None
    iscrowd: bool | int | None = False
    id: Any = None


class _Key(Struct):
    """What tells where an annotation belongs; the rest is read where it is drawn."""

    image_id: ImageId
    category_id: ImageId | None = None
    iscrowd: Any = None
    segments_info: Any = None


@dataclass(frozen=True, slots=True)
class _File:
    """An annotation file."""

    images: list[Any]
    annotations: dict[str, list[bytes]]  # Rows, by image id
    categories: list[_Category]  # Without those that only group others


@dataclass(frozen=True, slots=True)
class _Rules:
    """What drawing any image needs to know. A category that the source does not list is void."""

    own: Mapping[str, int]  # Categories, by their id in the file
    below: Mapping[str, int]  # The same of the second file
    stuff: frozenset[str]  # Those of the first that have no instances
    classes: Classes | None  # Of semantic maps
    first_class: int  # Category of the first of them, or of the background
    background: bool
    small: bool
    crowds: bool


def coco_instances(
    json: Path,
    images: Path,
    *,
    stuff_json: Path | None = None,
    semantic: Path | None = None,
    names: Path | None = None,
    void: Iterable[int] = (),
    background: str | None = None,
    stuff: Iterable[str] = (),
    small: bool = False,
    crowds: bool = True,
) -> Source:
    """The images of a file, each with its instances, and with stuff where another source has it.

    Categories in `stuff` have no instances. Where instances overlap, the last or the smaller one
    has the pixels. Without `crowds`, what is marked as one is an instance.
    """
    if sum(one is not None for one in (stuff_json, semantic, background)) > 1:
        what = "more than one source of what no instance covers"
        raise InputError(what, where="--stuff-json, --semantic-maps, --background")
    left_out: list[Rejection] = []
    file = _read(json, left_out)
    below = _read(stuff_json, left_out) if stuff_json else _File([], {}, [])
    maps = dict(pair_maps(images, semantic)[0]) if semantic else {}
    classes = make_classes(names, void, maps.values()) if semantic else None

    own = _numbers(file.categories, 0)
    second = _numbers(below.categories, max(own.values()))
    first = max([*own.values(), *second.values()]) + 1
    named = {str(row.name): str(row.id) for row in file.categories}
    if unknown := {*stuff} - {*named}:
        known = f"of {', '.join(named)}"
        raise InputError(f"no category is called {min(unknown)}", where="--stuff", remedy=known)
    mixed = any(row.isthing for row in file.categories)
    flat = frozenset(
        str(row.id)
        for row in file.categories
        if str(row.name) in {*stuff} or (mixed and not row.isthing)
    )
    categories = [_category(row, own, str(row.id) not in flat) for row in file.categories]
    # What a map of stuff says of things is void where no instance is; COCO calls all things other.
    categories += [
        _category(row, second, False)
        for row in below.categories
        if str(row.name) not in named and (row.name, row.supercategory) != ("other", "other")
    ]
    rest = [background] if background is not None else classes.names.values() if classes else []
    categories += [
        category(number, name, False)
        for number, name in enumerate(rest, first)
        if name not in named
    ]
    rules = _Rules(own, second, flat, classes, first, background is not None, small, crowds)

    items = _items(file, below, images, maps, rules, left_out=left_out)
    settings: dict[str, Any] = {"format": "coco-instances", "small": small, "crowds": crowds}
    if classes is not None:
        values = {str(value): name for value, name in classes.names.items()}
        settings |= {"classes": values, "void": sorted(classes.void)}
    return Source(categories, items, left_out, settings)


def _items(
    file: _File,
    below: _File,
    images: Path,
    maps: Mapping[str, Path],
    rules: _Rules,
    *,
    left_out: list[Rejection],
) -> list[Item]:
    """The images whose photos are there; the others are left out."""
    items, found, rows = [], Paths(images, walk(images, SUFFIXES)), dict(file.annotations)
    for each in file.images:
        said = loose_row(each)
        image_id, called = said.get("id", ""), str(said.get("file_name", ""))
        mine = rows.pop(str(image_id), [])
        try:
            image = parse_row(each, _Image)
            name = found.find(image.file_name)
            if rules.classes is not None and name not in maps:
                raise InputError("its map is missing", where=name, code="map-missing")
        except InputError as error:
            left_out.append(Rejection.of(image_id, called, error))
            continue
        except ValueError as error:
            message = f"malformed image: {error}"
            left_out.append(Rejection(str(image_id), called, "annotation-malformed", message))
            continue
        both = (mine, below.annotations.get(str(image_id), []))
        hashed = hashlib.sha256(repr((image, both)).encode())
        draw = partial(_draw, (images / name, maps.get(name)), image, both, rules)
        inputs = (maps[name],) if rules.classes is not None else ()
        items.append(Item(image.id, name, images / name, draw, inputs, hashed.hexdigest()))
    message = "annotation of an image that the file does not list"
    left_out += [Rejection(image_id, "", "image-missing", message) for image_id in rows]
    return items


def _read(path: Path, left_out: list[Rejection]) -> _File:
    """An annotation file; InputError where it is of another kind."""
    try:
        content = parse_file(read_file(path))
        if content.images is None or content.categories is None:
            raise ValueError("no images or no categories")
        categories = [parse_row(row, _Category) for row in content.categories]
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=path) from None
    except ValueError as error:
        raise InputError(
            f"not a COCO instances file: {error}",
            where=path,
            remedy="it needs images, annotations with segmentation, and categories",
        ) from None
    rows: dict[str, list[bytes]] = defaultdict(list)
    used, crowds, drawn = set(), 0, False
    for each in content.annotations:
        try:
            key = parse_row(each, _Key)
        except ValueError as error:
            message = f"annotation {loose_row(each).get('id', '')} malformed: {error}"
            left_out.append(Rejection("", "", "annotation-malformed", message))
            continue
        if key.segments_info is not None:
            what, remedy = "is in COCO's panoptic format already", "give it to preprocess"
            raise InputError(what, where=path, remedy=remedy)
        row = bytes(each) if isinstance(each, Raw) else msgspec.json.encode(each)
        rows[str(key.image_id)].append(row)
        used.add(str(key.category_id))
        crowds += bool(key.iscrowd)
        drawn = drawn or b'"segmentation"' in row
    if not drawn:
        what = "no annotation has a segmentation"
        raise InputError(what, where=path, remedy="boxes and points alone are no masks")
    if crowds == len(content.annotations):
        log.warning("%s: all are crowds, as CVAT marks what a brush drew: see --no-crowds", path)
    # Roboflow lists the dataset's own name as the category of all others.
    groups = {row.supercategory for row in categories if row.supercategory != row.name}
    kept = [row for row in categories if str(row.id) in used or row.name not in groups]
    if not kept or len({str(row.id) for row in kept}) < len(kept):
        raise InputError("categories are empty or share an id", where=path)
    return _File(content.images, dict(rows), kept)


def _numbers(rows: Iterable[_Category], above: int) -> dict[str, int]:
    """Ids by those in the file: the same where they are numbers and none is taken."""
    ids = [str(row.id) for row in rows]
    plain = [int(each) for each in ids if each.isdecimal()]
    if len({*plain}) == len(ids) and (not above or not plain or min(plain) > above):
        return dict(zip(ids, plain, strict=True))
    return {each: number for number, each in enumerate(ids, above + 1)}


def _category(row: _Category, numbers: Mapping[str, int], isthing: bool) -> dict[str, Any]:
    group = {} if row.supercategory is None else {"supercategory": str(row.supercategory)}
    return category(numbers[str(row.id)], str(row.name), isthing) | group


def _draw(
    files: tuple[Path, Path | None],
    image: _Image,
    both: tuple[list[bytes], list[bytes]],
    rules: _Rules,
    size: Size,
) -> Drawing:
    photo, semantic = files
    if image.height is not None and image.width is not None:
        check_size((image.height, image.width), photo, size, image.file_name)
    mended: list[str] = []
    layers: list[list[tuple[Row, Mask]]] = [[], [], [], []]  # stuff, own stuff, crowds, instances
    for data, numbers in zip(both, (rules.own, rules.below), strict=True):
        for each in data:
            row = _annotation(each, numbers)
            crowd = rules.crowds and bool(row.iscrowd)
            place = 2 if crowd else 3
            if numbers is rules.below:
                place = 0
            elif str(row.category_id) in rules.stuff:
                place = 1
            try:
                mask = read_segmentation(row.segmentation, size)
            except ValueError as error:
                said = f"segmentation of annotation {row.id}: {error}"
                raise InputError(said, code="segmentation-wrong") from None
            if mask is None:
                mended.append("segmentation-missing")
            else:
                layers[place].append((Row(numbers[str(row.category_id)], crowd), mask))
    rows, overlaps = [], 0
    segment_map = np.zeros(size, np.uint32)
    if rules.classes is not None and semantic is not None:
        segment_map = rules.classes.read(semantic, photo, size)
        rows = [Row(rules.first_class + place) for place in range(len(rules.classes.names))]
    elif rules.background:
        segment_map += 1
        rows = [Row(rules.first_class)]
    for number, layer in enumerate(layers):
        numbered = ((len(rows) + each, mask) for each, (_, mask) in enumerate(layer, 1))
        above, overlaps = paint(numbered, size, small=rules.small and number == 3)
        segment_map = np.where(above > 0, above, segment_map)
        rows += [row for row, _ in layer]
    return Drawing(segment_map, rows, overlaps, tuple(mended))


def _annotation(data: bytes, categories: Mapping[str, int]) -> _Annotation:
    """A row; InputError where it is malformed."""
    try:
        row = parse_row(Raw(data), _Annotation)
    except ValueError as error:
        name = loose_row(Raw(data)).get("id", "")
        raise InputError(
            f"annotation {name} malformed: {error}", code="annotation-malformed"
        ) from None
    if str(row.category_id) not in categories:
        what = f"annotation {row.id} has unknown category {row.category_id}"
        raise InputError(what, code="category-unknown")
    return row
