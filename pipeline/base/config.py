"""Configuration: frozen dataclasses, read from TOML, overridden by `a.b=c`.

Defaults live in the dataclasses and nowhere else; a TOML file holds only what differs. An unknown
key is an error that names the nearest known one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from panoptic_cache.pipeline.base.errors import InputError

T = TypeVar("T")


def fingerprint(*parts: object) -> str:
    """SHA-256 over the canonical JSON of the parts, as hex."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        InputError: The file is missing or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such configuration", where=path, remedy="see configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"not readable as TOML: {error}", where=path) from None


def load_config(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Reads a configuration: defaults, then the file, then `a.b=c` overrides in order."""
    return build_config(cls, override(read_toml(path), overrides), where=str(path))


def override(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Applies settings such as `optim.lr=1e-4`; a value is TOML, or else taken as a string."""
    result = copy.deepcopy(dict(values))
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise InputError("not of the form name=value", where=f"--set {setting}")
        *tables, key = name.split(".")
        table: Any = result
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"{part} is a value, not a table", where=f"--set {setting}")
        table[key] = _toml_value(text)
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build_config(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Makes a (nested) frozen dataclass of plain values.

    Args:
        cls: The dataclass.
        values: Its fields as TOML gives them.
        where: The file, for messages.

    Raises:
        InputError: An unknown or missing key, a value of another type or out of the allowed
            choices.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise InputError(f"unknown key {key}", where=where, remedy=known)
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"lacks {', '.join(missing)}", where=where)
    return cls(
        **{key: _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    )


def _convert(value: Any, kind: Any, where: str) -> Any:  # noqa: PLR0911 - one return a kind of type
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise InputError("must be a table", where=where)
        return build_config(kind, value, where=where)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or origin is Mapping:
        return value
    if origin in {Union, types.UnionType}:
        if value is None or (value == "none" and type(None) in arguments):
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise InputError(f"{value!r} is not a choice", where=where, remedy=f"one of {choices}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"must be a list, not {value!r}", where=where)
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise InputError(f"must have {len(arguments)} values, not {len(value)}", where=where)
        return tuple(_convert(item, arguments[0], where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"must be {kind.__name__}, not {value!r}", where=where)
    return value
