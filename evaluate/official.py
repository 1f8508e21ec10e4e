"""The reference evaluator, cocodataset/panopticapi, beside ours; optional, on no package index."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.pq import PQResult
from pipeline.errors import InputError

TOLERANCE = 1e-9
"""Differences below are rounding; sums in another order differ by some 1e-15."""
SOURCE = "git+https://github.com/cocodataset/panopticapi.git"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the reference says, and how far ours is from it.

    Attributes:
        groups: `pq`, `sq`, `rq` and `n` of All, Things and Stuff.
        difference: Largest absolute difference of any number, of groups or categories.
        at: Where that is, such as `All pq` or `category 17 sq`.
    """

    groups: Mapping[str, Mapping[str, float]]
    difference: float
    at: str

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return self.difference <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """The key `official` of `score --official --json`."""
        return {**self.groups, "difference": self.difference, "at": self.at}


def compare_official(
    result: PQResult,
    gt_json: Path,
    pred_json: Path,
    gt_dir: Path | None = None,
    pred_dir: Path | None = None,
) -> Agreement:
    """Runs the reference on the same files; it takes all processors, and prints to stderr here.

    Args:
        result: Ours.
        gt_json: Ground truth.
        pred_json: Prediction.
        gt_dir: Its PNGs; beside the JSON if None.
        pred_dir: The same of the prediction.

    Raises:
        InputError: It is not installed, or fails on these files.
    """
    try:
        reference = importlib.import_module("panopticapi.evaluation")
    except ImportError as error:
        raise InputError(
            f"the official evaluator cannot be imported: {error}",
            remedy=f"pip install '{SOURCE}', or score without --official",
            code="official-missing",
        ) from None
    folders = [None if folder is None else str(folder) for folder in (gt_dir, pred_dir)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            theirs = reference.pq_compute(str(gt_json), str(pred_json), *folders)
    except Exception as error:  # noqa: BLE001 - it raises whatever, such as for an empty group
        raise InputError(
            f"the official evaluator fails where ours does not: {type(error).__name__} {error}",
            where=pred_json,
            remedy="it divides by zero where Things or Stuff have no segment",
            code="official-failed",
        ) from None
    return compare_results(result.to_json(), theirs)


def compare_results(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Agreement:
    """Compares the objects of both evaluators, number by number."""
    differences = [
        (abs((ours[group] or {}).get(name, 0.0) - theirs[group][name]), f"{group} {name}")
        for group in ("All", "Things", "Stuff")
        for name in ("pq", "sq", "rq", "n")
    ]
    for category, values in theirs.get("per_class", {}).items():
        mine = ours["per_class"][str(category)]
        differences += [
            (abs(mine[name] - values[name]), f"category {category} {name}")
            for name in ("pq", "sq", "rq")
        ]
    difference, at = max(differences, key=lambda row: row[0])
    groups = {group: dict(theirs[group]) for group in ("All", "Things", "Stuff")}
    return Agreement(groups, difference, at)
