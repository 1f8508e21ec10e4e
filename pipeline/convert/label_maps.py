"""One integer map an image: 0 is background or void, every other value an instance.

What Cellpose, StarDist and most of microscopy write. A second map may tell the class of each pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.convert.files import image_ids, pair_maps
from panoptic_cache.pipeline.convert.semantic_maps import Classes, make_classes
from panoptic_cache.pipeline.convert.source import (
    Drawing,
    Item,
    Row,
    Size,
    Source,
    category,
    check_size,
    read_map,
)


def label_maps(
    images: Path,
    maps: Path,
    *,
    things: Sequence[str],
    background: str | None,
    semantic: Path | None,
    names: Path | None,
    void: Iterable[int],
) -> Source:
    """Photos and their instance maps.

    Without semantic maps all instances are of the one thing, and 0 is the background or, without
    one, void. With them `things` tells which classes have instances: an instance takes the class of
    most of its pixels, and what is no instance is the stuff that its map says.
    """
    pairs, left_out = pair_maps(images, maps)
    paths = dict(pairs)
    settings = {"format": "label-maps", "background": background, "semantic": semantic is not None}
    if semantic is None:
        if len(things) > 1:
            what = "several things need maps of their classes"
            raise InputError(what, where="--thing", remedy="give --semantic-maps")
        labels = [*(things or ["object"]), *([background] if background is not None else [])]
        categories = [category(number, name, number == 1) for number, name in enumerate(labels, 1)]
        items = []
        for image_id, name in image_ids(paths):
            draw = partial(_draw, images / name, paths[name], background is not None)
            items.append(Item(image_id, name, images / name, draw, (paths[name],)))
        return Source(categories, items, left_out, settings)

    if background is not None:
        what = "the maps of classes tell what is no instance"
        raise InputError(what, where="--background", remedy="leave it out")
    others, lonely = pair_maps(images, semantic)
    second = dict(others)
    left_out += [each for each in lonely if each.file in paths]
    classes = make_classes(names, void, second.values())
    numbers = {name: value for value, name in classes.names.items()}
    unknown = [name for name in things if name not in numbers]
    if unknown or not things:
        what = f"no class is called {unknown[0]}" if unknown else "which classes have instances?"
        raise InputError(what, where="--thing", remedy=f"of {', '.join(numbers)}")
    countable = frozenset(numbers[name] for name in things)
    items = []
    for image_id, name in image_ids(name for name in paths if name in second):
        both = (paths[name], second[name])
        draw = partial(_draw_both, images / name, both, classes, countable)
        items.append(Item(image_id, name, images / name, draw, both))
    categories = [category(value, name, name in things) for name, value in numbers.items()]
    return Source(categories, items, left_out, settings | {"void": sorted(classes.void)})


def _draw(photo: Path, path: Path, background: bool, size: Size) -> Drawing:
    values = read_map(path)
    check_size((values.shape[0], values.shape[1]), photo, size, path)
    instances, numbers = np.unique(values, return_inverse=True)
    shift = 0 if instances[0] == 0 else 1  # where no pixel is 0
    segment_map: NDArray[np.uint32] = (numbers.reshape(size) + shift).astype(np.uint32)
    count = int(segment_map.max(initial=0))
    rows = [Row(1)] * count
    if background:
        segment_map[values == 0] = count + 1
        rows.append(Row(2))
    return Drawing(segment_map, rows)


def _draw_both(
    photo: Path, both: tuple[Path, Path], classes: Classes, countable: frozenset[int], size: Size
) -> Drawing:
    path, semantic = both
    drawing = _draw(photo, path, False, size)
    numbers = classes.read(semantic, photo, size)
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
