"""Instances in COCO's JSON, as COCO itself, CVAT, Roboflow, FiftyOne and others write it.

Stuff may come from a second such file, or from semantic maps, and lies below the instances. Crowds
lie between them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw, Struct

from panoptic_cache.pipeline.annotations import ImageId, loose_row, parse_row
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.convert.categories import Classes, make_classes
from panoptic_cache.pipeline.convert.maps import pair_maps
from panoptic_cache.pipeline.convert.source import (
    Canvas,
    Drawing,
    Item,
    Mask,
    Row,
    Source,
    category,
    paint,
    read_items,
    read_lists,
    read_segmentation,
)
from panoptic_cache.pipeline.folders import Folder

log = logging.getLogger(__name__)

BELOW, STUFF, CROWD, INSTANCE = range(4)
"""Layers, from below: stuff of the second file, stuff of the first, crowds, instances."""


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
    annotations: Mapping[str, list[bytes]]  # Rows, by image id
    categories: list[_Category]  # Without those that only group others


Kinds = Mapping[str, tuple[int, int]]
"""A category of the source and its layer, by the category's id in a file."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What drawing any image needs to know. A category that the source does not list is void."""

    kinds: tuple[Kinds, Kinds]  # Of both files
    classes: Classes | None  # Of semantic maps
    rest: list[int]  # Categories of these classes, or of the background
    small: bool
    crowds: bool


def coco_instances(
    json: Path,
    images: Path,
    *,
    stuff_json: Path | None,
    semantic_maps: Path | None,
    names: Path | None,
    void: Iterable[int],
    background: str | None,
    stuff: Sequence[str],
    overlap: str,
    no_crowds: bool,
    follow_links: bool,
) -> Source:
    """The images of a file, each with its instances, and with stuff where another source has it.

    Categories in `stuff` have no instances. Where instances overlap, the last or the smaller one
    has the pixels. With `no_crowds`, what is marked as one is an instance.
    """
    if sum(one is not None for one in (stuff_json, semantic_maps, background)) > 1:
        what = "more than one source of what no instance covers"
        raise InputError(what, where="--stuff-json, --semantic-maps, --background")
    left_out: list[Rejection] = []
    file = _read(json, left_out)
    below = _read(stuff_json, left_out) if stuff_json else _File([], {}, [])
    maps: dict[str, tuple[Path]] = {}
    classes = None
    if semantic_maps:
        maps = pair_maps(images, semantic_maps, follow_links=follow_links)[0]
        classes = make_classes(names, void, [path for (path,) in maps.values()])

    own = _numbers(file.categories, 0)
    second = _numbers(below.categories, max(own.values()))
    first = max([*own.values(), *second.values()]) + 1
    named = {str(row.name) for row in file.categories}
    if unknown := {*stuff} - named:
        known = f"of {', '.join(str(row.name) for row in file.categories)}"
        raise InputError(f"no category is called {min(unknown)}", where="--stuff", remedy=known)
    mixed = any(row.isthing for row in file.categories)
    layers = {
        str(row.id): STUFF if str(row.name) in {*stuff} or (mixed and not row.isthing) else INSTANCE
        for row in file.categories
    }
    categories = [_category(row, own, layers[str(row.id)] == INSTANCE) for row in file.categories]
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
    kinds = (
        {each: (number, layers[each]) for each, number in own.items()},
        {each: (number, BELOW) for each, number in second.items()},
    )
    places = [*range(first, first + len(rest))]
    small, crowds = overlap == "small", not no_crowds
    rules = _Rules(kinds, classes, places, small, crowds)
    photos = Folder(images, "photo", follow_links=follow_links)

    def item(image: _Image) -> Item:
        name = photos.find_like(image.file_name)
        if classes is not None and name not in maps:
            raise InputError("its map is missing", where=name, code="map-missing")
        image_id = str(image.id)
        both = file.annotations.get(image_id, []), below.annotations.get(image_id, [])
        mark = hashlib.sha256(repr((image, both)).encode()).hexdigest()
        inputs = maps.get(name, ())
        draw = partial(_draw, inputs, image, both, rules)
        return Item(image.id, name, images / name, draw, inputs, mark)

    items, without = read_items(file.images, _Image, item, "image")
    listed = {str(loose_row(each).get("id", "")) for each in file.images}
    listed |= {str(item.image_id) for item in items}
    message = "annotation of an image that the file does not list"
    left_out += without
    left_out += [
        Rejection(image_id, "", "image-missing", message)
        for image_id in file.annotations
        if image_id not in listed
    ]
    settings: dict[str, Any] = {"format": "coco-instances", "small": small, "crowds": crowds}
    if classes is not None:
        values = {str(value): name for value, name in classes.names.items()}
        settings |= {"classes": values, "void": sorted(classes.void)}
    return Source(categories, items, left_out, settings)


def _read(path: Path, left_out: list[Rejection]) -> _File:
    """An annotation file; InputError where it is of another kind."""
    remedy = "it needs images, annotations with segmentation, and categories"
    content, categories = read_lists(path, _Category, "instances", remedy)
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
    return _File(content.images, rows, kept)


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
    maps: Sequence[Path],
    image: _Image,
    both: tuple[list[bytes], list[bytes]],
    rules: _Rules,
    canvas: Canvas,
) -> Drawing:
    size = canvas.size
    if image.height is not None and image.width is not None:
        canvas.check((image.height, image.width), image.file_name)
    mended: list[str] = []
    layers: list[list[tuple[Row, Mask]]] = [[], [], [], []]
    for data, kinds in zip(both, rules.kinds, strict=True):
        for each in data:
            row = _annotation(each, kinds)
            crowd = rules.crowds and bool(row.iscrowd)
            number, layer = kinds[str(row.category_id)]
            try:
                mask = read_segmentation(row.segmentation, size)
            except ValueError as error:
                said = f"segmentation of annotation {row.id}: {error}"
                raise InputError(said, code="segmentation-wrong") from None
            if mask is None:
                mended.append("segmentation-missing")
            else:
                layer = CROWD if crowd and layer == INSTANCE else layer
                layers[layer].append((Row(number, crowd), mask))
    rows, overlaps = [Row(number) for number in rules.rest], 0
    segment_map = np.full(size, len(rows), np.uint32)  # the background, if there is one
    for path in maps:
        assert rules.classes is not None
        segment_map = rules.classes.read(path, canvas)
    for place, some in enumerate(layers):
        numbered = enumerate((mask for _, mask in some), len(rows) + 1)
        above, overlaps = paint(numbered, size, small=rules.small and place == INSTANCE)
        segment_map = np.where(above > 0, above, segment_map)
        rows += [row for row, _ in some]
    return Drawing(segment_map, rows, overlaps, tuple(mended))


def _annotation(data: bytes, kinds: Kinds) -> _Annotation:
    """A row; InputError where it is malformed."""
    try:
        row = parse_row(Raw(data), _Annotation)
    except ValueError as error:
        what = f"annotation {loose_row(Raw(data)).get('id', '')} malformed: {error}"
        raise InputError(what, code="annotation-malformed") from None
    if str(row.category_id) not in kinds:
        what = f"annotation {row.id} has unknown category {row.category_id}"
        raise InputError(what, code="category-unknown")
    return row
