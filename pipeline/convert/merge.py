"""Categories merged on the way in: several names become one, or void."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from panoptic_cache.pipeline.base.config import decode_json, read_toml
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.convert.source import Draw, Drawing, Size, Source, category

VOID = "void"
"""The name in a table for what becomes unlabelled."""


def merge(source: Source, rule: str) -> Source:
    """A source whose categories are merged by `supercategory`, or by a table `new = [names]`.

    Categories that a table does not mention stay as they are. Raises InputError where a table names
    none of the source, or a category twice, or where things and stuff would be one.
    """
    if rule == "supercategory":
        table = {
            str(row["name"]): str(row.get("supercategory") or row["name"])
            for row in source.categories
        }
    else:
        table = _read_table(Path(rule), [str(row["name"]) for row in source.categories])
    merged: dict[str, dict[str, Any]] = {}
    numbers: dict[int, int] = {}
    for row in source.categories:
        old = str(row["name"])
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


def _draw(draw: Draw, numbers: Mapping[int, int], size: Size) -> Drawing:
    drawing = draw(size)
    rows = [row._replace(category_id=numbers.get(row.category_id, -1)) for row in drawing.rows]
    return replace(drawing, rows=rows)


def _read_table(path: Path, names: list[str]) -> dict[str, str]:
    """New names by old ones."""
    try:
        rows = decode_json(path.read_bytes(), dict) if path.suffix == ".json" else read_toml(path)
        pairs = [
            (str(old), str(new))
            for new, olds in rows.items()
            for old in ([olds] if isinstance(olds, str) else olds)
        ]
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=path) from None
    except (ValueError, TypeError, AttributeError):
        remedy = "write lines such as: vehicle = ['car', 'bus']"
        raise InputError("no table of names", where=path, remedy=remedy) from None
    table: dict[str, str] = {}
    for old, new in pairs:
        if old not in names:
            near = difflib.get_close_matches(old, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"of {', '.join(names)}"
            raise InputError(f"no category is called {old}", where=path, remedy=remedy)
        if table.setdefault(old, new) != new:
            raise InputError(f"{old} becomes {table[old]} and {new}", where=path)
    return table
