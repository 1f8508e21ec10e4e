"""TOML and JSON as declared types, and configurations: frozen dataclasses, overridden by `a.b=c`.

Defaults live in the dataclasses and nowhere else; a TOML file holds only what differs. An unknown
key is an error that names the nearest known one. What only a few need is imported where it is used:
scoring, which reads JSON, starts sooner by it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import read_file

T = TypeVar("T")


def fingerprint(*parts: object) -> str:
    """SHA-256 over the canonical JSON of the parts, as hex."""
    import hashlib  # noqa: PLC0415

    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def decode_json(data: bytes, kind: type[T]) -> T:
    """JSON as a declared type; ValueError says in a line what is damaged, missing or another type.

    Reads what Python's own parser reads: with a byte-order mark, half surrogate pairs, NaN and
    1e400.
    """
    try:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as error:
            if isinstance(error, msgspec.ValidationError) and "out of range" not in str(error):
                raise
            return msgspec.convert(json.loads(data), kind)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; InputError where it is missing or no TOML."""
    import tomllib  # noqa: PLC0415

    try:
        return tomllib.loads(read_file(path).decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError("no such configuration", where=path, remedy="see configs/") from None
    except RecursionError:
        raise InputError("not readable as TOML: nested too deeply", where=path) from None
    except (ValueError, OSError) as error:
        raise InputError(f"not readable as TOML: {error}", where=path) from None


def load_config(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Reads a configuration: defaults, then the file, then `a.b=c` overrides in order."""
    try:
        return build_config(cls, override(read_toml(path), overrides), where=str(path))
    except RecursionError:
        raise InputError("tables are nested too deeply", where=path) from None


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
    import tomllib  # noqa: PLC0415

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def build_config(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Makes a (nested) frozen dataclass of plain values; `none` is None, which TOML has not.

    InputError for an unknown or missing key, a value of another type or out of the choices.
    """
    try:
        return msgspec.convert(_known(cls, values, where), cls)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        what = what.replace("Object missing required field", "lacks")
        keys = path.strip(".`")
        place = f"{where}: {keys}" if keys else where
        raise InputError(what, where=place, remedy=_choices(cls, keys)) from None


def _known(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values, in whose tables every key is known."""
    hints = get_type_hints(cls)
    known: dict[str, Any] = {}
    for key, value in dict(values).items():
        if key not in hints:
            import difflib  # noqa: PLC0415

            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(hints)}"
            raise InputError(f"unknown key {key}", where=where, remedy=remedy)
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            known[key] = _known(cast("type", kind), value, f"{where}: {key}")
        elif dataclasses.is_dataclass(part := [*get_args(kind), None][0]) and _are_tables(value):
            known[key] = [_known(cast("type", part), each, f"{where}: {key}") for each in value]
        else:
            known[key] = None if value == "none" and type(None) in get_args(kind) else value
    return known


def _are_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, Mapping) for each in value)


def _choices(cls: type, keys: str) -> str:
    """What the field at the end of a path of keys may be, if it is one of several values."""
    kind: Any = cls
    for key in keys.split("."):
        kind = get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
    for each in (kind, *get_args(kind)):
        if get_origin(each) is Literal:
            return f"one of {', '.join(map(str, get_args(each)))}"
    return ""
