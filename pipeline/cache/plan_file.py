"""`plan.json`: the settings a cache folder was begun with, so that it never mixes two plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_read

PLAN_NAME = "plan.json"


def encode_plan(fingerprint: str, settings: Mapping[str, Any]) -> bytes:
    """The bytes of `plan.json`: a plan's fingerprint, its split and its settings."""
    values = {"fingerprint": fingerprint, "settings": dict(settings)}
    return json.dumps(values, indent=1).encode() + b"\n"


def claim(storage: Storage, fingerprint: str, settings: Mapping[str, Any]) -> None:
    """Writes `plan.json`; raises InputError where the folder belongs to another plan."""
    if not is_claimed(storage, fingerprint, settings):
        storage.write(PLAN_NAME, encode_plan(fingerprint, settings))


def claimed_by(storage: Storage, file: str = PLAN_NAME) -> str | None:
    """The plan's fingerprint as `plan.json` or a shard's sidecar says; None without that file."""
    try:
        return str(json.loads(storage.read(file))["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_claimed(storage: Storage, fingerprint: str, settings: Mapping[str, Any]) -> bool:
    """Whether a folder was begun with this plan; False for a new one, or one without `plan.json`.

    Raises:
        InputError: It was begun with another plan, or holds something else.
    """
    try:
        found = json.loads(storage.read(PLAN_NAME))
        if found["fingerprint"] == fingerprint:
            return True
        changed = [
            f"{name} was {found['settings'].get(name)}, now {value}"
            for name, value in settings.items()
            if found["settings"].get(name) != value
        ]
        raise InputError(
            "; ".join(changed)
            or "the annotation file, the set of images on the disk or the format changed",
            where=storage.url,
            remedy="the cache here was begun otherwise: use its settings or another folder",
            code="plan-changed",
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise cannot_read(error, storage.path(PLAN_NAME)) from None
        what = "holds tars but no plan"
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "plan damaged"
    sidecars = [f"{name[:-4]}.json" for name in storage.sizes() if name.endswith(".tar")]
    if any(claimed_by(storage, name) != fingerprint for name in sidecars):
        raise InputError(what, where=storage.path(PLAN_NAME), remedy="use another folder")
    return False
