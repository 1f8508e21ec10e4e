"""The reference evaluator, cocodataset/panopticapi, beside ours; optional, on no package index.

Its `pq_compute` forks as many processes as there are processors, prints, and divides by zero where
Things or Stuff have no segment. So its parts are called one by one: the matching of each image, in
this process, and the averages of each group.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from panoptic_cache.evaluate.metric.pairs import png_folder
from panoptic_cache.evaluate.metric.pq import PQResult
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError

TOLERANCE = 1e-9
"""Differences below are rounding; sums in another order differ by some 1e-15."""
SOURCE = "git+https://github.com/cocodataset/panopticapi.git"
GROUPS = {"All": None, "Things": True, "Stuff": False}
"""Its own names, and what it calls `isthing`."""
COUNTS = ("tp", "fp", "fn", "iou")


def import_official() -> ModuleType:
    """The reference's module; InputError where it is not installed."""
    try:
        return importlib.import_module("panopticapi.evaluation")
    except ImportError as error:
        raise InputError(
            f"the official evaluator cannot be imported: {error}",
            remedy=f"pip install '{SOURCE}', or score without --official",
            code="official-missing",
        ) from None


def run_official(
    reference: Any,
    gt_json: Path,
    pred_json: Path,
    gt_dir: Path | None = None,
    pred_dir: Path | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs the reference on files that ours has accepted, in this process, quietly.

    Arguments as of `pairs.read_pairs`; `advance` is called after each image. Returns the keys of
    `PQResult.to_json`, a group that it divides by zero for as None. Raises InputError where the
    reference fails on an image.
    """
    gt, pred = (decode_json(path.read_bytes(), dict) for path in (gt_json, pred_json))
    categories = {row["id"]: row for row in gt["categories"]}
    folders = str(gt_dir or png_folder(gt_json)), str(pred_dir or png_folder(pred_json))
    predictions = {row["image_id"]: row for row in pred["annotations"]}
    match = inspect.unwrap(reference.pq_compute_single_core)  # wrapped, it prints tracebacks
    total = reference.PQStat()
    for row in gt["annotations"]:
        pair = row, predictions[row["image_id"]]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                total += match(0, [pair], *folders, categories)
        except Exception as error:  # noqa: BLE001 - a KeyError for most of what it refuses
            raise InputError(
                f"the official evaluator fails where ours does not: {type(error).__name__} {error}",
                where=f"{pred_json}: image {row['image_id']}",
                remedy="score without --official",
                code="official-failed",
            ) from None
        advance()
    found: dict[str, Any] = dict.fromkeys(GROUPS)
    counts = {id_: {name: getattr(total[id_], name) for name in COUNTS} for id_ in categories}
    for name, isthing in GROUPS.items():
        with contextlib.suppress(ZeroDivisionError):
            group, members = total.pq_average(categories, isthing=isthing)
            found[name] = _plain(group)
            for id_, means in members.items():
                counts[id_] |= means
    return {**found, "per_class": {str(id_): _plain(values) for id_, values in counts.items()}}


def compare_results(ours: PQResult, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The key `official` of `score --official --json`; `theirs` is what `run_official` returned.

    The reference's groups, the largest absolute `difference` of any number of ours from its, and
    `at` which number, such as `All pq` or `category 17 sq`. An undefined group counts as zeros.
    """
    mine = ours.to_json()
    pairs = {f"{name} ": (mine[name], theirs[name]) for name in GROUPS}
    for id_, values in theirs["per_class"].items():
        pairs[f"category {id_} "] = mine["per_class"][id_], values
    differences = [(0.0, "nowhere")]
    for where, (one, other) in pairs.items():
        a, b = one or {}, other or {}
        differences += [(abs(a.get(key, 0) - b.get(key, 0)), where + key) for key in {**a, **b}]
    difference, at = max(differences, key=lambda row: row[0])
    return {**{name: theirs[name] for name in GROUPS}, "difference": difference, "at": at}


def _plain(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of Python; the reference's are numpy's."""
    return {
        name: value if isinstance(value, int) else float(value) for name, value in values.items()
    }
