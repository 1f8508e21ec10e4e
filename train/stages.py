"""A run in stages: trainings one after another, each from the weights of the one before.

    [[stages]]
    epochs = 280
    tasks = {instance = 1, semantic = 0}
    data = {size = 280, batch = 1024}

A stage is a run of its own, in `OUT/stage-1`, `OUT/stage-2`, ..., with a fresh schedule. Its table
holds what differs from the rest of the file; settings of the command line hold for all stages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panoptic_cache.pipeline.base.config import build_config, override, read_toml
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import TrainConfig

log = logging.getLogger(__name__)


def load_stages(path: Path, settings: Sequence[str] = ()) -> list[TrainConfig]:
    """The configurations of a file's stages, in order; one where it has none.

    InputError where the file is no TOML, or a value of it is wrong, with the stage.
    """
    values = read_toml(path)
    tables = values.pop("stages", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError("stages must be tables: [[stages]]", where=path)
    runs: list[TrainConfig] = []
    for number, table in enumerate(tables or [{}], 1):
        where = f"{path}, stage {number}" if tables else str(path)
        if {"out", "stages"} & {*table}:
            raise InputError("a stage has no out and no stages of its own", where=where)
        merged = find_again(override(merge(values, table), settings), path)
        if tables:
            merged["out"] = f"{merged.get('out', TrainConfig().out)}/stage-{number}"
        if runs:
            merged["model"] = {**merged.get("model", {}), "init": runs[-1].out}
        runs.append(build_config(TrainConfig, merged, where=where))
    return runs


def find_again(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Relative paths of a run's own `config.toml`, which was moved or is read from elsewhere."""
    folder = path.resolve().parent
    if path.name != "config.toml" or not (folder / "checkpoints").is_dir():
        return values
    out = Path(values.get("out", TrainConfig().out))
    if folder.parts[-len(out.parts) :] == out.parts:
        values["out"] = str(folder)
    elif out.resolve() != folder:
        message = "%s names out = %s, which is not its folder; --set out=%s goes on in there"
        log.warning(message, path, out, folder)
    for table in (values.get("data"), values.get("validation")):
        if not isinstance(table, dict):
            continue
        places = [(table, "cache")]
        if isinstance(parts := table.get("caches"), list):
            places += [(part, "path") for part in parts if isinstance(part, dict)]
        for place, name in places:
            cache = place.get(name)
            if isinstance(cache, str) and "://" not in cache and not Path(cache).exists():
                found = [parent / cache for parent in folder.parents if (parent / cache).exists()]
                place[name] = str(found[0]) if found else cache
    return values


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with the changes put in."""
    merged = {**values, **changes}
    for key in values.keys() & changes.keys():
        if isinstance(values[key], Mapping) and isinstance(changes[key], Mapping):
            merged[key] = merge(values[key], changes[key])
    return merged


def begun_stages(runs: Sequence[TrainConfig]) -> int:
    """How many stages lie in their folders; all but the last of them are complete."""
    begun = [(Path(run.out) / "config.toml").exists() for run in runs]
    return len(begun) - begun[::-1].index(True) if any(begun) else 0
