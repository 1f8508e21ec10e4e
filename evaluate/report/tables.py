"""Scores as text: tables for the terminal, and what they share with the page. All in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from panoptic_cache.pipeline.base.terminal import table
from panoptic_cache.pipeline.coco import Category


def score_text(
    values: Mapping[str, Any], categories: Sequence[Category], *, by_category: bool = True
) -> str:
    """All tables of a score, as the terminal shows them; `values` as of `Scores.to_json`."""
    parts: list[str] = []
    if by_category:
        columns = ("category", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN")
        rows: list[tuple[str, ...]] = []
        for category in categories:
            stat = values["per_class"][str(category.id)]
            counts = [stat[name] for name in ("tp", "fp", "fn")]
            qualities = _qualities(stat if any(counts) else None)
            kind = "thing" if category.isthing else "stuff"
            rows.append((category.name, kind, *qualities, *map(str, counts)))
        parts.append(table(columns, rows, left=2))
    groups = {name: values[name] for name in ("All", "Things", "Stuff")}
    rows = [(name, *_qualities(one), str(one["n"] if one else 0)) for name, one in groups.items()]
    parts.append(table(("group", "PQ", "SQ", "RQ", "categories"), rows, left=1))
    if "sizes" in values:
        sizes = [row for row in values["sizes"] if row["n"]]
        rows = [(size_name(row), str(row["n"]), percent(row["iou"])) for row in sizes]
        if rows:
            parts.append(table(("things by size", "instances", "IoU"), rows, left=1))
        parts.append(", ".join(f"{name} {value}" for name, value in measures(values)))
    if "seconds_per_image" in values:
        steps = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in values["seconds_per_image"].items())
        parts[-1] += f"\n{values['images']} images; ms an image: {steps}"
    return "\n\n".join(parts)


def measures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the measures besides PQ; `values` as of `Scores.to_json`."""
    ap, agnostic = values["mask_ap"] or {}, values["things_agnostic"] or {}
    numbers = {
        "class-agnostic PQ of things": agnostic.get("pq"),
        "semantic mIoU": values["semantic"]["miou"],
        "mask AP": ap.get("ap"),
        "AP50": ap.get("ap50"),
        "AP75": ap.get("ap75"),
    }
    return [(name, percent(value)) for name, value in numbers.items()]


def size_name(row: Mapping[str, Any]) -> str:
    """`32-64 px` or `512+ px`; `row` as in `Breakdown.to_json`."""
    return f"{row['from']}+ px" if row["to"] is None else f"{row['from']}-{row['to']} px"


def percent(value: float | None) -> str:
    """A fraction in percent, with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def _qualities(score: Mapping[str, Any] | None) -> list[str]:
    """PQ, SQ and RQ of a group or a category."""
    return [percent(score[name] if score else None) for name in ("pq", "sq", "rq")]
