"""What categories are called: the classes of semantic maps, and categories that are merged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.config import decode_json, read_toml
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.convert.source import (
    Canvas,
    Draw,
    Drawing,
    Source,
    category,
    read_map,
)

MOST = 1 << 16
"""Values of classes are below."""
VOID = "void"
"""The name in a table of merged categories for what becomes unlabelled."""
_UNDECLARED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Classes:
    """The values of semantic maps."""

    names: dict[int, str]  # By value, ascending
    void: frozenset[int]  # Values that are no class

    def read(self, path: Path, canvas: Canvas) -> NDArray[np.uint32]:
        """(H, W) of a map: 0 = void, i = the i-th class; InputError as of `read_map`.

        The same where it has an undeclared value.
        """
        values = read_map(path, canvas)
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


def make_classes(names: Path | None, void: Iterable[int], maps: Iterable[Path]) -> Classes:
    """The classes that a file names, or else those that occur in maps that can be read."""
    nothing = frozenset(void)
    if names is not None:
        named = sorted(_read_names(names).items())
        return Classes({value: name for value, name in named if value not in nothing}, nothing)
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


def _read_names(path: Path) -> dict[int, str]:
    """Names by value: TOML or JSON of `name = value` or `value = name`, or lines `value name`."""
    with _reading(path, "names no classes", "write lines such as: 7 road"):
        if path.suffix == ".toml":
            table: Any = read_toml(path)
        elif path.suffix == ".json":
            table = decode_json(path.read_bytes(), object)
        else:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            table = dict(re.split(r"[\s,:;=]+", line.strip(), maxsplit=1) for line in lines)
        if isinstance(table, list):
            table = dict(enumerate(table))
        names = dict(
            (value, str(key)) if isinstance(value, int) else (int(key), str(value))
            for key, value in table.items()
        )
    valid = all(0 <= value < MOST for value in names)
    if not names or not valid or len({*names.values()}) < len(names):
        raise InputError(f"values are 0 to {MOST - 1}, each with a name of its own", where=path)
    return names


@contextmanager
def _reading(path: Path, problem: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=path) from None
    except (ValueError, TypeError, AttributeError):
        raise InputError(problem, where=path, remedy=remedy) from None


def merge(source: Source, rule: str) -> Source:
    """A source whose categories are merged by `supercategory`, or by a table `new = [names]`.

    Categories that a table does not mention stay as they are. Raises InputError where a table names
    none of the source, or a category twice, or where things and stuff would be one.
    """
    names = [str(row["name"]) for row in source.categories]
    if rule == "supercategory":
        groups = [row.get("supercategory") or row["name"] for row in source.categories]
        table = dict(zip(names, map(str, groups), strict=True))
    else:
        table = _read_table(Path(rule), names)
    merged: dict[str, dict[str, Any]] = {}
    numbers: dict[int, int] = {}
    for old, row in zip(names, source.categories, strict=True):
        new = table.get(old, old)
        if new == VOID:
            continue
        first = merged.setdefault(new, category(len(merged) + 1, new, bool(row["isthing"])))
        if first["isthing"] != int(row["isthing"]):
            what = f"{new} would be things and stuff: {old} is not what the others are"
            raise InputError(what, where=f"--merge {rule}", remedy="give them two names")
        numbers[row["id"]] = first["id"]
    items = [replace(item, draw=partial(_draw, item.draw, numbers)) for item in source.items]
    settings = source.settings | {"merge": numbers}
    return replace(source, categories=[*merged.values()], items=items, settings=settings)


def _draw(draw: Draw, numbers: Mapping[int, int], canvas: Canvas) -> Drawing:
    drawing = draw(canvas)
    rows = [row._replace(category_id=numbers.get(row.category_id, -1)) for row in drawing.rows]
    return replace(drawing, rows=rows)


def _read_table(path: Path, names: list[str]) -> dict[str, str]:
    """New names by old ones."""
    with _reading(path, "no table of names", "write lines such as: vehicle = ['car', 'bus']"):
        rows = decode_json(path.read_bytes(), dict) if path.suffix == ".json" else read_toml(path)
        pairs = [
            (str(old), str(new))
            for new, olds in rows.items()
            for old in ([olds] if isinstance(olds, str) else olds)
        ]
    table: dict[str, str] = {}
    for old, new in pairs:
        if old not in names:
            near = difflib.get_close_matches(old, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"of {', '.join(names)}"
            raise InputError(f"no category is called {old}", where=path, remedy=remedy)
        if table.setdefault(old, new) != new:
            raise InputError(f"{old} becomes {table[old]} and {new}", where=path)
    return table
