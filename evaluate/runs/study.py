"""A study file: one question, answered by runs that differ in a few settings.

study file -> Study -> a Run for each variant and seed       OUT/VARIANT/seed-0/
a Run -> preprocess, train, evaluate                         see `execute.py`
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from panoptic_cache.pipeline.base.config import build_config, load_config, read_toml
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import TrainConfig

METRIC = "panoptic_cache.evaluate.held_out:panoptic_quality"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a study."""

    name: str  # As the table shows it
    set: tuple[str, ...] = ()  # Settings that it changes, as `--set` takes them
    # Name of the variant whose trained models it takes, where only the evaluation differs.
    trained_by: str = ""
    evaluate: tuple[str, ...] = ()  # Further options of `panoptic evaluate`
    paper: float | None = None  # All PQ that the paper gives, percent


@dataclass(frozen=True, slots=True)
class Study:
    """A study file."""

    title: str  # Of the page
    config: str  # The training configuration that all variants start from
    coco: str  # Root of the dataset, in COCO's layout
    train_split: str  # Split that is trained on
    test_split: str  # Split that is scored
    variants: tuple[Variant, ...]  # `[[variants]]`, in the order of the table
    text: str = ""  # What the study asks, for the page
    base: str = ""  # The variant that the others are compared with; empty: the first
    seeds: tuple[int, ...] = (0,)  # Each variant is trained once for each
    set: tuple[str, ...] = ()  # Settings of all variants
    preprocess: tuple[str, ...] = ()  # Options of `panoptic preprocess`, such as `--size=96`
    evaluate: tuple[str, ...] = ()  # Options of `panoptic evaluate`
    # Steps between two points of the curve of PQ on samples of the test split; 0: no curve.
    curve_every: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One variant with one seed."""

    variant: Variant
    seed: int
    folder: Path  # Holds `train/`, `evaluate/`, `log.txt` and `run.json`
    train_folder: Path  # Of the trained model, which may be another run's
    settings: tuple[str, ...]  # All of `--set`

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant.name}, seed {self.seed}"


def read_study(path: Path) -> Study:
    """Reads and checks a study file.

    Raises:
        InputError: No TOML, an unknown key, two variants of one name, a variant that names none,
            or a training setting that does not exist.
    """
    values = read_toml(path)
    tables = values.pop("variants", None)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError("has no [[variants]]", where=path, remedy="see studies/")
    variants = [
        build_config(Variant, table, where=f"{path}: variant {number}")
        for number, table in enumerate(tables, 1)
    ]
    study = build_config(Study, {**values, "variants": variants}, where=str(path))
    names = Counter(variant.name for variant in study.variants)
    folders = Counter(folder_name(name) for name in names)
    problems = [
        ("needs variants and seeds", not names or not study.seeds),
        ("names a seed twice", len({*study.seeds}) < len(study.seeds)),
        *((f"has two variants {name!r}", count > 1) for name, count in names.items()),
        *((f"has two variants whose folder is {name!r}", n > 1) for name, n in folders.items()),
        (f"has no variant {study.base!r}, its base", study.base not in {"", *names}),
        *(
            (f"has no variant {each.trained_by!r} that trains", not _trains(study, each))
            for each in study.variants
        ),
    ]
    for message, wrong in problems:
        if wrong:
            raise InputError(f"the study {message}", where=path)
    return study


def folder_name(name: str) -> str:
    """The folder of a variant: its name in letters, digits and dashes."""
    return re.sub(r"[^0-9a-z]+", "-", name.lower()).strip("-") or "variant"


def plan_runs(study: Study, out: Path) -> list[Run]:
    """The runs, in the order in which they are made: all variants with the first seed come first.

    Runs that train stand before those that take their models.
    """
    shared = [f"data.cache={out / 'cache' / 'train'}", *study.set]
    if study.curve_every:
        cache = out / "cache" / "test"
        shared += [f"validation.cache={cache}", f"validation.every={study.curve_every}"]
        shared.append(f"validation.metric={METRIC}")
    return [
        Run(
            variant,
            seed,
            out / folder_name(variant.name) / f"seed-{seed}",
            train_folder := out
            / folder_name(variant.trained_by or variant.name)
            / f"seed-{seed}"
            / "train",
            (*shared, *variant.set, f"seed={seed}", f"out={train_folder}"),
        )
        for seed in study.seeds
        for variant in sorted(study.variants, key=lambda each: each.trained_by != "")
    ]


def run_config(study: Study, run: Run) -> TrainConfig:
    """The training configuration of a run.

    Raises:
        InputError: One of its settings does not exist or has no sense.
    """
    return load_config(TrainConfig, Path(study.config), run.settings)


def trained_runs(runs: Sequence[Run]) -> Iterator[Run]:
    """Those that train a model of their own."""
    return (run for run in runs if not run.variant.trained_by)


def _trains(study: Study, variant: Variant) -> bool:
    """Whether the variant trains, or the one that it names does."""
    return not variant.trained_by or any(
        each.name == variant.trained_by and not each.trained_by for each in study.variants
    )
