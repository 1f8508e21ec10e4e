"""What the runs of a study reached: a row for each variant, curves over steps and over sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from panoptic_cache.evaluate.prediction_files import SCORES
from panoptic_cache.evaluate.report.tables import size_name
from panoptic_cache.evaluate.runs.execute import Note, last_step
from panoptic_cache.evaluate.runs.study import Run, Study, Variant
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.terminal import table
from panoptic_cache.train.runlog import lines_of

Scores = Mapping[str, Any]
"""`scores.json`, see `Outcome.to_json`."""
Spread = dict[str, float | None]
"""`mean` and `sd`, the standard deviation over the seeds (None for one seed); percent."""
Points = list[tuple[float, float]]

MEASURES = ("All", "Things", "Stuff", "SQ", "RQ", "mIoU")
FEWEST = 10
"""Instances of a size below which the mean of their IoU is chance."""
COLUMNS = ("variant", *MEASURES, "to base", "paper", "seeds", "hours")


@dataclass(frozen=True, slots=True)
class Row:
    """What the seeds of one variant reached."""

    variant: Variant
    values: dict[str, Spread | None]  # By `MEASURES`
    ahead: Spread | None  # All PQ of this variant less the base's, seed by seed
    hours: float  # Of training, over the seeds
    seeds: tuple[int, ...]  # Those that are done
    failed: tuple[tuple[int, str], ...]  # Seed, and why
    curve: Points  # Step, PQ of held-out samples in percent, mean over seeds
    sizes: list[tuple[str, float]]  # Size of things, mean IoU in percent

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "variant": self.variant.name,
            **self.values,
            "to_base": self.ahead,
            "paper": self.variant.paper,
            "hours": round(self.hours, 3),
            "seeds": list(self.seeds),
            "failed": [{"seed": seed, "line": line} for seed, line in self.failed],
        }

    def cells(self) -> list[str]:
        """What the table shows, by `COLUMNS`."""
        paper = self.variant.paper
        return [
            self.variant.name,
            *(spread_text(self.values[name]) or "-" for name in MEASURES),
            spread_text(self.ahead, "+"),
            "" if paper is None else f"{paper:.2f}",
            str(len(self.seeds)),
            f"{self.hours:.2f}",
        ]

    def failures(self) -> list[str]:
        """A line for each seed that failed."""
        return [f"{self.variant.name}, seed {seed} failed: {line}" for seed, line in self.failed]


def make_rows(study: Study, runs: Sequence[Run], notes: Mapping[Path, Note]) -> list[Row]:
    """A row for each variant, in the order of the study file."""
    scores: dict[str, dict[int, Scores]] = {variant.name: {} for variant in study.variants}
    for run in runs:
        if notes[run.folder].status == "done":
            path = run.folder / "evaluate" / SCORES
            scores[run.variant.name][run.seed] = decode_json(path.read_bytes(), dict)
    rows = []
    for variant in study.variants:
        found = {seed: measures(each) for seed, each in scores[variant.name].items()}
        base = {seed: measures(each)["All"] for seed, each in scores[study.base].items()}
        ahead = [
            own["All"] - other
            for seed, own in found.items()
            if own["All"] is not None and (other := base.get(seed)) is not None
        ]
        mine = [run for run in runs if run.variant.name == variant.name]
        row = Row(
            variant=variant,
            values={name: over_seeds([each[name] for each in found.values()]) for name in MEASURES},
            ahead=over_seeds(ahead) if variant.name != study.base else None,
            hours=sum(notes[run.folder].hours for run in mine),
            seeds=tuple(found),
            failed=tuple(
                (run.seed, notes[run.folder].line)
                for run in mine
                if notes[run.folder].status == "failed"
            ),
            curve=mean_curve([[*read_curve(run)] for run in mine if run.seed in found]),
            sizes=mean_sizes([*scores[variant.name].values()]),
        )
        rows.append(row)
    return rows


def measures(scores: Scores) -> dict[str, float | None]:
    """Values of `MEASURES`: fractions, None where undefined."""
    every = scores["All"] or {}
    parts = {name: (scores[name] or {}).get("pq") for name in ("All", "Things", "Stuff")}
    return parts | {
        "SQ": every.get("sq"),
        "RQ": every.get("rq"),
        "mIoU": scores["semantic"]["miou"],
    }


def over_seeds(values: Sequence[float | None]) -> Spread | None:
    """Mean and standard deviation in percent of those fractions that are defined."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return None
    return {"mean": fmean(known), "sd": stdev(known) if len(known) > 1 else None}


def spread_text(spread: Spread | None, sign: str = "") -> str:
    """`68.5 ± 1.2`; with the sign `+` a difference."""
    if spread is None:
        return ""
    mean = f"{spread['mean']:{sign}z.1f}"  # z: no -0.0
    return mean if spread["sd"] is None else f"{mean} ± {spread['sd']:.1f}"


def read_curve(run: Run) -> Iterator[tuple[float, float]]:
    """Steps and PQ (percent) of a run's validations, its stages one after another."""
    before = 0
    for stage in run.stages:
        path = Path(stage.out) / "metrics.jsonl"
        for line in lines_of(path) if path.exists() else ():
            if "pq" in line.get("validation", ()):
                yield before + line["step"], 100 * line["validation"]["pq"]
        before += last_step(path.parent)


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean over the seeds at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = set.intersection(*map(set, tables)) if tables else set()
    return [(step, fmean(each[step] for each in tables)) for step in sorted(steps)]


def mean_sizes(found: Sequence[Scores]) -> list[tuple[str, float]]:
    """Name and mean IoU over the seeds of each size that has `FEWEST` instances."""
    return [
        (size_name(rows[0]), 100 * fmean(row["iou"] for row in rows))
        for rows in zip(*(scores["sizes"] for scores in found), strict=True)
        if all(row["n"] >= FEWEST for row in rows)
    ]


def rows_text(rows: Sequence[Row]) -> str:
    """The table, as the terminal shows it."""
    shown = table(COLUMNS, [row.cells() for row in rows], left=1)
    return "\n".join((shown, *(line for row in rows for line in row.failures())))
