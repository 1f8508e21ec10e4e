"""One map of classes an image and no instances: everything is stuff."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.config import decode_json, read_toml
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.convert.files import image_ids, pair_maps
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

MOST = 1 << 16
"""Values of classes are below."""
_UNDECLARED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Classes:
    """The values of semantic maps."""

    names: dict[int, str]  # By value, ascending
    void: frozenset[int]  # Values that are no class

    def read(self, path: Path, photo: Path, size: Size) -> NDArray[np.uint32]:
        """(H, W) of a map: 0 = void, i = the i-th class.

        Raises:
            InputError: It cannot be read, is not of the photo's size, or has an undeclared value.
        """
        values = read_map(path)
        check_size((values.shape[0], values.shape[1]), photo, size, path)
        table = np.full(MOST + 1, _UNDECLARED, np.uint32)
        table[[*self.void]] = 0
        table[[*self.names]] = np.arange(1, len(self.names) + 1)
        numbers: NDArray[np.uint32] = table[np.minimum(values, MOST)]
        unknown = numbers == _UNDECLARED
        if unknown.any():
            raise InputError(
                f"value {values[unknown][0]} at {np.count_nonzero(unknown)} pixels is undeclared",
                where=path,
                remedy="name it in --names, or give it as --void",
                code="class-unknown",
            )
        return numbers


def semantic_maps(images: Path, maps: Path, *, names: Path | None, void: Iterable[int]) -> Source:
    """Photos and their maps; without a file of names, the classes are the values that occur."""
    pairs, left_out = pair_maps(images, maps)
    classes = make_classes(names, void, (path for _, path in pairs))
    paths = dict(pairs)
    items = [
        Item(
            image_id,
            name,
            images / name,
            partial(_draw, images / name, paths[name], classes),
            (paths[name],),
        )
        for image_id, name in image_ids(paths)
    ]
    categories = [category(value, name, False) for value, name in classes.names.items()]
    settings = {"format": "semantic-maps", "void": sorted(classes.void)}
    return Source(categories, items, left_out, settings)


def _draw(photo: Path, path: Path, classes: Classes, size: Size) -> Drawing:
    return Drawing(classes.read(path, photo, size), [Row(value) for value in classes.names])


def make_classes(names: Path | None, void: Iterable[int], maps: Iterable[Path]) -> Classes:
    """The classes that a file names, or else those that occur in maps that can be read."""
    nothing = frozenset(void)
    if names is not None:
        return Classes(_without(read_names(names), nothing), nothing)
    seen: set[int] = set()
    for path in maps:
        try:
            seen.update(np.unique(read_map(path)).tolist())
        except InputError:
            continue  # it is left out, with its reason, when it is drawn
    if not seen - nothing or len(seen) > 1024 or max(seen) >= MOST:
        raise InputError(
            f"{len(seen)} values occur in the maps, the largest is {max(seen, default=0)}",
            remedy="maps of classes have a few small values: name them in a file for --names",
        )
    return Classes({value: f"class {value}" for value in sorted(seen - nothing)}, nothing)


def _without(names: Mapping[int, str], void: frozenset[int]) -> dict[int, str]:
    return {value: name for value, name in sorted(names.items()) if value not in void}


def read_names(path: Path) -> dict[int, str]:
    """Names by value: TOML or JSON of `name = value` or `value = name`, or lines `value name`.

    InputError where the file says something else.
    """
    try:
        if path.suffix == ".toml":
            table: Any = read_toml(path)
        elif path.suffix == ".json":
            table = decode_json(path.read_bytes(), object)
        else:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            table = dict(re.split(r"[\s,:;=]+", line.strip(), maxsplit=1) for line in lines)
        if isinstance(table, list):
            table = dict(enumerate(table))
        names = dict(_named(key, value) for key, value in table.items())
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=path) from None
    except (ValueError, TypeError, AttributeError, UnicodeDecodeError):
        raise InputError(
            "names no classes", where=path, remedy="write lines such as: 7 road"
        ) from None
    if (
        not names
        or not all(0 <= value < MOST for value in names)
        or len({*names.values()}) < len(names)
    ):
        raise InputError(f"values are 0 to {MOST - 1}, each with a name of its own", where=path)
    return names


def _named(key: Any, value: Any) -> tuple[int, str]:
    """A pair of value and name, whichever comes first."""
    if isinstance(value, int):
        return value, str(key)
    return int(key), str(value)
