"""A study file: one question, answered by runs that differ in a few settings.

study file -> Study -> a Run for each variant and seed       OUT/VARIANT/seed-0/
a Run -> preprocess, train, evaluate                         see `execute.py`
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from panoptic_cache.pipeline.base.config import build_config, read_toml
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.stages import load_stages

METRIC = "panoptic_cache.evaluate.held_out:panoptic_quality"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a study."""

    name: str  # As the table shows it
    set: tuple[str, ...] = ()  # Settings that it changes, as `--set` takes them
    # Where only the evaluation differs, whose models it takes: the name of another variant, or the
    # folder of a run (with a slash), in which `{seed}` stands for the seed.
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
    arguments: tuple[str, ...]  # The configuration with its settings, as commands take it
    stages: tuple[TrainConfig, ...]  # What is trained, one after another; none if it is wrong
    problem: str  # What is wrong with the settings

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether it trains a model of its own."""
        return not self.variant.trained_by

    def steps(self, images: int) -> int:
        """Optimizer steps, with so many images to train on; 0 if the settings are wrong."""
        return sum(stage.total_steps(images) for stage in self.stages if self.trains)


def read_study(path: Path) -> Study:
    """A checked study file; InputError, also for a variant that takes the models of none."""
    study = build_config(Study, read_toml(path), where=str(path))
    names = Counter(variant.name for variant in study.variants)
    study = replace(study, base=study.base or next(iter(names), ""))
    folders = Counter(folder_name(name) for name in names)
    trained = {each.name for each in study.variants if not each.trained_by}
    takers = {each.trained_by for each in study.variants if "/" not in each.trained_by}
    problems = [
        ("needs variants and seeds", not names or not study.seeds),
        ("names a seed twice", len({*study.seeds}) < len(study.seeds)),
        *((f"has two variants {name!r}", count > 1) for name, count in names.items()),
        *((f"has two variants whose folder is {name!r}", n > 1) for name, n in folders.items()),
        (f"has no variant {study.base!r}, its base", study.base not in names),
        *((f"has no variant {name!r} that trains", True) for name in takers - trained - {""}),
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
    runs = []
    for seed in study.seeds:
        for variant in sorted(study.variants, key=lambda each: each.trained_by != ""):
            folder = out / folder_name(variant.name) / f"seed-{seed}"
            trained_by = variant.trained_by or variant.name
            train = out / folder_name(trained_by) / f"seed-{seed}" / "train"
            if "/" in variant.trained_by:
                train = Path(trained_by.replace("{seed}", str(seed)))
            settings = [*shared, *variant.set, f"seed={seed}", f"out={train}"]
            stages, problem = list[TrainConfig](), ""
            try:
                stages = load_stages(Path(study.config), settings)
            except InputError as error:
                problem = str(error)
            arguments = (study.config, *(part for each in settings for part in ("--set", each)))
            runs.append(Run(variant, seed, folder, train, arguments, tuple(stages), problem))
    return runs
