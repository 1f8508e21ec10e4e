"""Results as rows of text, for the terminal and for the page; percent throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from panoptic_cache.evaluate.metric.pq import CategoryStat, GroupPQ, PQResult
from panoptic_cache.pipeline.base.text import table
from panoptic_cache.pipeline.coco import Category

GROUP_COLUMNS = ("group", "PQ", "SQ", "RQ", "categories")
CATEGORY_COLUMNS = ("category", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN")
SIZE_COLUMNS = ("things by size", "instances", "IoU")


def pq_table(result: PQResult) -> list[tuple[str, ...]]:
    """A row for All, Things and Stuff, in percent; see `GROUP_COLUMNS`."""
    return [
        (name, *_percents(group), str(group.n if group else 0))
        for name, group in (("All", result.all), ("Things", result.things), ("Stuff", result.stuff))
    ]


def category_table(result: PQResult, categories: Sequence[Category]) -> list[tuple[str, ...]]:
    """A row for each category, in percent; see `CATEGORY_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for category in categories:
        stat = result.per_class[category.id]
        kind = "thing" if category.isthing else "stuff"
        counts = (str(stat.tp), str(stat.fp), str(stat.fn))
        rows.append((category.name, kind, *_percents(None if stat.empty else stat), *counts))
    return rows


def size_table(sizes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each size that has instances; see `SIZE_COLUMNS` and `Measures.to_json`."""
    return [(size_name(row), str(row["n"]), percent(row["iou"])) for row in sizes if row["n"]]


def size_name(row: Mapping[str, Any]) -> str:
    """`32-64 px`, `512+ px`."""
    return f"{row['from']}+ px" if row["to"] is None else f"{row['from']}-{row['to']} px"


def measure_table(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands beside PQ, by name, in percent.

    Args:
        values: See `Scores.to_json`.
    """
    ap, agnostic = values["mask_ap"] or {}, values["things_agnostic"] or {}
    numbers = {
        "class-agnostic PQ of things": agnostic.get("pq"),
        "semantic mIoU": values["semantic"]["miou"],
        "mask AP": ap.get("ap"),
        "AP50": ap.get("ap50"),
        "AP75": ap.get("ap75"),
    }
    return [(name, percent(value)) for name, value in numbers.items()]


def score_text(
    result: PQResult,
    categories: Sequence[Category],
    values: Mapping[str, Any],
    *,
    by_category: bool = True,
) -> str:
    """All tables of a score, as the terminal shows them.

    Args:
        result: The metric.
        categories: Of the ground truth.
        values: See `Scores.to_json`; PQ alone will do.
        by_category: With a row for each category.
    """
    parts = [table(GROUP_COLUMNS, pq_table(result), left=1)]
    if by_category:
        parts.insert(0, table(CATEGORY_COLUMNS, category_table(result, categories), left=2))
    if "sizes" in values:
        parts.append(table(SIZE_COLUMNS, size_table(values["sizes"]), left=1))
        parts.append(", ".join(f"{k} {v}" for k, v in measure_table(values)))
    return "\n\n".join(parts)


def percent(value: float | None) -> str:
    """A fraction in percent, with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def _percents(score: GroupPQ | CategoryStat | None) -> tuple[str, str, str]:
    """PQ, SQ and RQ."""
    if score is None:
        return "-", "-", "-"
    return percent(score.pq), percent(score.sq), percent(score.rq)
