"""What the runs of a study reached: a row for each variant, curves over steps and over sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from panoptic_cache.evaluate.prediction_files import SCORES
from panoptic_cache.evaluate.report.tables import size_name
from panoptic_cache.evaluate.runs.execute import Note
from panoptic_cache.evaluate.runs.study import Run, Study, Variant
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.terminal import table

Scores = Mapping[str, Any]
"""`scores.json`, see `Outcome.to_json`."""

MEASURES: dict[str, Callable[[Scores], float | None]] = {
    "All": lambda scores: (scores["All"] or {}).get("pq"),
    "Things": lambda scores: (scores["Things"] or {}).get("pq"),
    "Stuff": lambda scores: (scores["Stuff"] or {}).get("pq"),
    "SQ": lambda scores: (scores["All"] or {}).get("sq"),
    "RQ": lambda scores: (scores["All"] or {}).get("rq"),
    "mIoU": lambda scores: scores["semantic"]["miou"],
}
"""Columns of the table; values are fractions, None where undefined."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A measure over the seeds, percent."""

    mean: float
    sd: float | None  # Standard deviation; None for fewer than two seeds
    signed: bool = False  # Whether it is a difference

    def __str__(self) -> str:
        mean = f"{self.mean:{'+' if self.signed else ''}.1f}"
        return mean if self.sd is None else f"{mean} ± {self.sd:.1f}"


@dataclass(frozen=True, slots=True)
class Row:
    """What the seeds of one variant reached."""

    variant: Variant
    values: dict[str, Measured | None]  # By the names of `MEASURES`
    ahead: Measured | None  # All PQ of this variant less the base's, seed by seed
    hours: float  # Of training, over the seeds
    seeds: tuple[int, ...]  # Those that are done
    failed: tuple[tuple[int, str], ...]  # Seed, and why
    curve: list[tuple[float, float]]  # Step, PQ of held-out samples in percent, mean over seeds
    sizes: list[tuple[str, int, float]]  # Size of things, instances, mean IoU in percent

    def to_json(self) -> dict[str, Any]:
        """Plain values."""

        def plain(value: Measured | None) -> dict[str, float | None] | None:
            return None if value is None else {"mean": value.mean, "sd": value.sd}

        return {
            "variant": self.variant.name,
            **{name: plain(value) for name, value in self.values.items()},
            "to_base": plain(self.ahead),
            "paper": self.variant.paper,
            "hours": round(self.hours, 3),
            "seeds": list(self.seeds),
            "failed": [{"seed": seed, "line": line} for seed, line in self.failed],
        }


def make_rows(study: Study, runs: Sequence[Run], notes: Mapping[Path, Note]) -> list[Row]:
    """A row for each variant, in the order of the study file."""
    base = study.base or study.variants[0].name
    scores: dict[str, dict[int, Scores]] = {variant.name: {} for variant in study.variants}
    for run in runs:
        if notes[run.folder].status == "done":
            path = run.folder / "evaluate" / SCORES
            scores[run.variant.name][run.seed] = decode_json(path.read_bytes(), dict)
    return [
        make_row(
            [run for run in runs if run.variant.name == variant.name],
            notes,
            scores[variant.name],
            {} if variant.name == base else scores[base],
        )
        for variant in study.variants
    ]


def make_row(
    runs: Sequence[Run],
    notes: Mapping[Path, Note],
    scores: Mapping[int, Scores],
    base: Mapping[int, Scores],
) -> Row:
    """The row of one variant; `scores` and those of the base by seed."""
    all_pq = MEASURES["All"]
    pairs = [(all_pq(scores[s]), all_pq(base[s])) for s in scores if s in base]
    curves = [[*read_curve(run.train_folder)] for run in runs if run.seed in scores]
    return Row(
        variant=runs[0].variant,
        values={
            name: over_seeds([value(each) for each in scores.values()])
            for name, value in MEASURES.items()
        },
        ahead=over_seeds(
            [own - other for own, other in pairs if own is not None and other is not None],
            signed=True,
        ),
        hours=sum(notes[run.folder].hours for run in runs),
        seeds=tuple(scores),
        failed=tuple(
            (run.seed, notes[run.folder].line)
            for run in runs
            if notes[run.folder].status == "failed"
        ),
        curve=mean_curve(curves),
        sizes=mean_sizes([*scores.values()]),
    )


def over_seeds(values: Sequence[float | None], *, signed: bool = False) -> Measured | None:
    """Mean and standard deviation in percent of those fractions that are defined."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return None
    return Measured(fmean(known), stdev(known) if len(known) > 1 else None, signed)


def read_curve(folder: Path) -> Iterator[tuple[float, float]]:
    """Steps and PQ (percent) of a run's validations."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            values = decode_json(line, dict)
            if "validation" in values:
                yield values["step"], 100 * values["validation"]["pq"]
        except (ValueError, KeyError, TypeError):
            continue


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over the seeds at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = set.intersection(*map(set, tables)) if tables else set()
    return [(step, fmean(each[step] for each in tables)) for step in sorted(steps)]


def mean_sizes(found: Sequence[Scores]) -> list[tuple[str, int, float]]:
    """Name, instances and mean IoU over the seeds of each size that has instances."""
    if not found:
        return []
    return [
        (size_name(rows[0]), rows[0]["n"], 100 * fmean(row["iou"] for row in rows))
        for rows in zip(*(scores["sizes"] for scores in found), strict=True)
        if all(row["n"] for row in rows)
    ]


def rows_text(rows: Sequence[Row]) -> str:
    """The table, as the terminal shows it."""
    columns = ("variant", *MEASURES, "to base", "paper", "seeds", "hours")
    lines = [
        (
            row.variant.name,
            *(str(row.values[name] or "-") for name in MEASURES),
            str(row.ahead or ""),
            "" if row.variant.paper is None else f"{row.variant.paper:.2f}",
            str(len(row.seeds)),
            f"{row.hours:.2f}",
        )
        for row in rows
    ]
    failed = [
        f"{row.variant.name}, seed {seed} failed: {line}"
        for row in rows
        for seed, line in row.failed
    ]
    return "\n".join((table(columns, lines, left=1), *failed))
