"""Formats that are pictures: maps of instances, maps of classes, and a mask a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.convert.categories import Classes, make_classes
from panoptic_cache.pipeline.convert.source import (
    Canvas,
    Drawing,
    Item,
    Row,
    Source,
    category,
    paint,
    read_map,
    read_mask,
)
from panoptic_cache.pipeline.folders import Folder
from panoptic_cache.pipeline.photo import SUFFIXES

MAPS = (".png", ".tif", ".tiff", ".bmp")
"""Suffixes of maps and masks, in lower case."""
ENDINGS = ("", "_masks", "_mask", "_labels", "_label", "_labelids", "_cp_masks", "_gt", "_seg")
"""What stands behind a photo's name in its map's name; the first that is there is taken."""
PHOTO_ENDING = "_img"
"""What may stand behind it in the photo's."""


def label_maps(
    images: Path,
    maps: Path,
    *,
    thing: Sequence[str],
    background: str | None,
    semantic_maps: Path | None,
    names: Path | None,
    void: Sequence[int],
    follow_links: bool,
) -> Source:
    """One integer map an image, as Cellpose, StarDist and most of microscopy write them.

    0 is the background or, without one, void, and every other value an instance of the one thing.
    With semantic maps `thing` tells which classes have instances: an instance takes the class of
    most of its pixels, and what is no instance is the stuff that its map says.
    """
    pairs, left_out = pair_maps(images, maps, follow_links=follow_links)
    with_classes = semantic_maps is not None
    settings = {"format": "label-maps", "background": background, "semantic": with_classes}
    if semantic_maps is None:
        if len(thing) > 1:
            what = "several things need maps of their classes"
            raise InputError(what, where="--thing", remedy="give --semantic-maps")
        labels = [*(thing or ["object"]), *([background] if background is not None else [])]
        categories = [category(number, name, number == 1) for number, name in enumerate(labels, 1)]
        draw = partial(_draw_instances, background=background is not None)
        return Source(categories, _items(images, pairs, draw), left_out, settings)

    if background is not None:
        what = "the maps of classes tell what is no instance"
        raise InputError(what, where="--background", remedy="leave it out")
    second, lonely = pair_maps(images, semantic_maps, follow_links=follow_links)
    left_out += [each for each in lonely if each.file in pairs]
    classes = make_classes(names, void, [path for (path,) in second.values()])
    numbers = {name: value for value, name in classes.names.items()}
    unknown = [name for name in thing if name not in numbers]
    if unknown or not thing:
        what = f"no class is called {unknown[0]}" if unknown else "which classes have instances?"
        raise InputError(what, where="--thing", remedy=f"of {', '.join(numbers)}")
    countable = frozenset(numbers[name] for name in thing)
    both = {name: (*paths, *second[name]) for name, paths in pairs.items() if name in second}
    items = _items(images, both, partial(_draw_both, classes=classes, countable=countable))
    categories = [category(value, name, name in thing) for name, value in numbers.items()]
    return Source(categories, items, left_out, settings | {"void": sorted(classes.void)})


def semantic_maps(
    images: Path, maps: Path, *, names: Path | None, void: Sequence[int], follow_links: bool
) -> Source:
    """Maps of classes alone; without a file of names, the classes are the values that occur."""
    pairs, left_out = pair_maps(images, maps, follow_links=follow_links)
    classes = make_classes(names, void, [path for (path,) in pairs.values()])
    categories = [category(value, name, False) for value, name in classes.names.items()]
    settings = {"format": "semantic-maps", "void": sorted(classes.void)}
    items = _items(images, pairs, partial(_draw_classes, classes=classes))
    return Source(categories, items, left_out, settings)


def masks(
    root: Path, *, thing: str, background: str | None, overlap: str, follow_links: bool
) -> Source:
    """The folders below `root` with a photo in `images/` and a binary mask a file in `masks/`.

    The layout of the 2018 Data Science Bowl. What no mask covers is background, or void.
    """
    if not root.is_dir():
        raise InputError("no such folder", where=root)
    items, left_out = [], []
    inside = Folder(root, "file", follow_links=follow_links)
    small = overlap == "small"
    for folder in sorted(place.parent for place in root.rglob("images") if place.is_dir()):
        name = folder.relative_to(root).as_posix()
        try:
            photos = Folder(folder / "images", "photo", follow_links=True).files(SUFFIXES)
            if len(photos) > 1:
                what = f"{len(photos)} photos, such as {photos[0]} and {photos[1]}"
                raise InputError(what, where=folder / "images", code="photo-ambiguous")
            if not (folder / "masks").is_dir():
                raise InputError("no folder masks", where=folder, code="mask-missing")
            photo = folder / "images" / photos[0]
            files = tuple(
                path
                for path in sorted((folder / "masks").iterdir())
                if path.suffix.lower() in MAPS and not path.name.startswith(".")
            )
            for path in (photo, *files):  # no link that leads out
                inside.find(path.relative_to(root).as_posix())
        except InputError as error:
            left_out.append(Rejection.of(name, f"{name}/images", error))
            continue
        draw = partial(_draw_masks, files, background=background is not None, small=small)
        new = f"{name}{photo.suffix}" if name != "." else photo.name
        items.append(Item(name, new, photo, draw, files))
    if not items:
        why = f": {left_out[0].message}" if left_out else ""
        raise InputError(f"no folder here holds images/ and masks/{why}", where=root)
    labels = [thing, background] if background is not None else [thing]
    return Source(
        [category(number, each, number == 1) for number, each in enumerate(labels, 1)],
        items,
        left_out,
        {"format": "masks", "background": background, "small": small},
    )


def pair_maps(
    images: Path, maps: Path, *, follow_links: bool
) -> tuple[dict[str, tuple[Path]], list[Rejection]]:
    """The map of each photo, by the photo's relative path; and what has no partner.

    Both may lie in one folder. A map has the path of its photo, or its name alone, before one of
    `ENDINGS` and a suffix. Links that lead out of a folder are left out.
    """
    map_folder = Folder(maps, "map", follow_links=follow_links)
    photo_folder = Folder(images, "photo", follow_links=follow_links)
    named = {_stem(name).casefold(): name for name in map_folder.files(MAPS)}
    times = Counter(Path(name).name for name in named)
    alone = {Path(stem).name: name for stem, name in named.items() if times[Path(stem).name] == 1}
    photos = photo_folder.files(SUFFIXES)
    stems = {_stem(name).casefold() for name in photos}
    one_folder = images.samefile(maps)
    pairs: dict[str, tuple[Path]] = {}
    lonely, used = [], set()
    for name in photos:
        stem = _stem(name).casefold()
        if one_folder and _photo_of(stem) & stems:
            continue  # it is a map
        bases = (stem, stem.removesuffix(PHOTO_ENDING))
        keys = [f"{base}{ending}" for base in bases for ending in ENDINGS]
        found = [named[key] for key in keys if key in named]
        found += [alone[Path(key).name] for key in keys if Path(key).name in alone]
        found = [each for each in found if maps / each != images / name]
        used.update(found[:1])
        try:
            if not found:
                what = f"its map is missing in {maps.name}"
                raise InputError(what, code="map-missing")
            photo_folder.find(name)
            map_folder.find(found[0])
            pairs[name] = (maps / found[0],)
        except InputError as error:
            lonely.append(Rejection.of(_stem(name), name, error))
    is_photo = {images / name for name in photos}
    for name in sorted({*named.values()} - used):
        if maps / name not in is_photo:
            what = f"its photo is missing in {images.name}"
            lonely.append(Rejection(_stem(name), name, "photo-missing", what))
    return pairs, lonely


def _photo_of(stem: str) -> set[str]:
    """What the photo of a map may be called."""
    bases = {stem.removesuffix(ending) for ending in ENDINGS if stem.endswith(ending)} - {stem}
    return bases | {f"{base}{PHOTO_ENDING}" for base in bases}


def _stem(name: str) -> str:
    """A relative path without the suffix of its last part."""
    return Path(name).with_suffix("").as_posix()


def _items(
    images: Path, inputs: Mapping[str, tuple[Path, ...]], draw: Callable[..., Drawing]
) -> list[Item]:
    """The images, by their photos, with the maps that `draw` takes.

    Their ids are the paths without suffix, where these are unique.
    """
    times = Counter(map(_stem, inputs))
    return [
        Item(
            stem if times[stem := _stem(name)] == 1 else name,
            name,
            images / name,
            partial(draw, *paths),
            paths,
        )
        for name, paths in inputs.items()
    ]


def _draw_instances(path: Path, canvas: Canvas, *, background: bool) -> Drawing:
    values = read_map(path, canvas)
    instances, numbers = np.unique(values, return_inverse=True)
    shift = 0 if instances[0] == 0 else 1  # where no pixel is 0
    segment_map: NDArray[np.uint32] = (numbers.reshape(values.shape) + shift).astype(np.uint32)
    count = int(segment_map.max(initial=0))
    rows = [Row(1)] * count
    if background:
        segment_map[values == 0] = count + 1
        rows.append(Row(2))
    return Drawing(segment_map, rows)


def _draw_classes(path: Path, canvas: Canvas, *, classes: Classes) -> Drawing:
    return Drawing(classes.read(path, canvas), [Row(value) for value in classes.names])


def _draw_both(
    path: Path, semantic: Path, canvas: Canvas, *, classes: Classes, countable: frozenset[int]
) -> Drawing:
    drawing = _draw_instances(path, canvas, background=False)
    numbers = classes.read(semantic, canvas)
    count, kinds = len(drawing.rows), len(classes.names) + 1
    votes = np.bincount(
        (drawing.segment_map * kinds + numbers).ravel(), minlength=(count + 1) * kinds
    )
    values = [0, *classes.names]
    votes = votes.reshape(count + 1, kinds)[1:]
    votes[:, 0] = votes[:, 1:].sum(1) == 0  # void wins where there is nothing else
    winners = votes.argmax(1).tolist()
    for number, winner in enumerate(winners, 1):
        if values[winner] not in countable or winner == 0:
            instance = read_map(path)[drawing.segment_map == number][0]
            name = classes.names[values[winner]] if winner else "void"
            raise InputError(
                f"instance {instance} lies on {name}, which is no thing",
                where=path,
                remedy="give it as --thing, or mend the map",
                code="class-unknown",
            )
    rows = [Row(values[winner]) for winner in winners]
    stuff = np.array([False, *(value not in countable for value in classes.names)])
    free = (drawing.segment_map == 0) & stuff[numbers]
    segment_map = np.where(free, numbers + count, drawing.segment_map).astype(np.uint32)
    return Drawing(segment_map, [*rows, *(Row(value) for value in classes.names)])


def _draw_masks(
    files: tuple[Path, ...], canvas: Canvas, *, background: bool, small: bool
) -> Drawing:
    numbered = ((number, read_mask(path, canvas)) for number, path in enumerate(files, 1))
    segment_map, overlaps = paint(numbered, canvas.size, small=small)
    rows = [Row(1)] * len(files)
    if background:
        segment_map[segment_map == 0] = len(files) + 1
        rows.append(Row(2))
    return Drawing(segment_map, rows, overlaps)
