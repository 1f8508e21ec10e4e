"""Makes the runs of a study by the ordinary commands, one after another.

    OUT/cache/{train,test}              panoptic preprocess
    OUT/VARIANT/seed-0/train            panoptic train --resume
    OUT/VARIANT/seed-0/evaluate         panoptic evaluate
    OUT/VARIANT/seed-0/{run.json,log.txt}

A command that is stopped goes on where it was. A run that fails is noted and the others are made.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tomli_w

from panoptic_cache.evaluate.runs.study import Run, Study, plan_runs
from panoptic_cache.pipeline.base.config import decode_json, fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, no_links
from panoptic_cache.pipeline.base.process import Interrupted
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.index import INDEX_NAME
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset

log = logging.getLogger(__name__)

RUN_FILE, LOG_FILE = "run.json", "log.txt"
POLL = 0.5
"""Seconds between two looks at a command that runs."""


@dataclass(frozen=True, slots=True)
class Note:
    """What `run.json` says of a run."""

    settings: str  # Digest of everything that the run depends on
    status: Literal["trained", "done", "failed"]
    line: str = ""  # Why it failed
    hours: float = 0.0  # Wall time of its training


def run_study(study: Study, out: Path, launcher: Sequence[str] = ()) -> dict[Path, Note]:
    """Renders, trains and evaluates what is missing; the note of each run, by its folder.

    The launcher, such as `accelerate launch --num_processes 8`, runs training and evaluation.
    InputError: a cache cannot be rendered, or a run of other settings lies in the folder.
    """
    storage = Storage(str(out))
    storage.create()
    with storage.locked():
        runs = plan_runs(study, out)
        notes = {run.folder: read_note(study, run) for run in runs}
        images = count_images(study, runs)
        if images:
            render_cache(study, out / "cache" / "train", study.train_split)
        if images and study.curve_every:
            render_cache(study, out / "cache" / "test", study.test_split)
        totals = {run.folder: run.steps(images) for run in runs}
        done = sum(total for at, total in totals.items() if notes[at].status != "failed")
        with progress("study", sum(totals.values()), "steps", done) as advance:
            for run in runs:
                if notes[run.folder].status == "done":
                    continue
                told = partial(advance, note=run.name)
                note = make_run(study, run, notes[run.folder], launcher, told)
                notes[run.folder] = note
                if note.status == "failed":
                    log.error("%s failed: %s", run.name, note.line)
                    left = totals[run.folder] - steps_made(run)
                    advance(max(0, left), f"{run.name} failed")
    return notes


def make_run(
    study: Study, run: Run, note: Note, launcher: Sequence[str], advance: Callable[[int], None]
) -> Note:
    """Trains and evaluates one run, and notes how it ended."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.problem:
        return write_note(run, replace(note, status="failed", line=run.problem))
    try:
        if note.status != "trained" and run.trains:
            start = time.monotonic()
            call(run, [*module("train", launcher), *run.arguments, "--resume"], advance)
            hours = note.hours + (time.monotonic() - start) / 3600
            note = write_note(run, replace(note, status="trained", line="", hours=hours))
        dataset = ["--coco", study.coco, "--split", study.test_split]
        folders = ["--checkpoint", str(run.train_folder), "--out", str(run.folder / "evaluate")]
        options = [*study.evaluate, *run.variant.evaluate]
        call(run, [*module("cli", launcher), "evaluate", *folders, *dataset, *options])
        return write_note(run, replace(note, status="done", line=""))
    except InputError as error:
        return write_note(run, replace(note, status="failed", line=str(error)))


def module(name: str, launcher: Sequence[str] = ()) -> list[str]:
    """How a program of ours is started."""
    return [*(launcher or [sys.executable]), "-m", f"panoptic_cache.{name}"]


def call(run: Run, command: Sequence[str], advance: Callable[[int], None] | None = None) -> None:
    """Runs a command with its messages in the run's log; tells the steps that it makes.

    InputError with its last line if it failed; Interrupted once it has stopped as it was told.
    """
    path = run.folder / LOG_FILE
    before = steps_made(run)
    with open(path, "a", opener=no_links) as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        try:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        except OSError as error:
            raise InputError(f"cannot be started: {error}", where=command[0]) from None
        try:
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
                if advance and (step := steps_made(run)) > before:
                    advance(step - before)
                    before = step
        except Interrupted as stop:
            process.terminate()
            process.wait()
            stop.advice = "run the same command to go on"
            raise
    if process.returncode:
        raise InputError(
            last_line(path.read_text(errors="replace"), process.returncode), where=path
        )


def last_line(text: str, code: int) -> str:
    """Why a command failed: the last line that it printed, or its code if there is none."""
    return next((line for line in text.splitlines()[::-1] if line.strip()), f"exit code {code}")


def render_cache(study: Study, folder: Path, split: str) -> None:
    """Renders a cache, unless it is complete; the command tells on the terminal why it cannot."""
    if (folder / INDEX_NAME).exists():
        return
    options = ["--coco", study.coco, "--split", split, "--out", str(folder), *study.preprocess]
    command = [*module("cli"), "preprocess", *options]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise InputError(f"panoptic preprocess failed with code {code}", where=folder)


def count_images(study: Study, runs: Sequence[Run]) -> int:
    """Images that are trained on; 0 if nothing is trained."""
    if not any(run.trains for run in runs):
        return 0
    return len(read_dataset(CocoLayout.of(Path(study.coco), study.train_split)).records)


def steps_made(run: Run) -> int:
    """Steps that the run has logged, in all of its stages."""
    return sum(last_step(Path(stage.out)) for stage in run.stages)


def last_step(folder: Path) -> int:
    """The last step that is logged in a folder; 0 for none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            for line in reversed(file.read().splitlines()):
                with suppress(ValueError, TypeError, KeyError):
                    return int(decode_json(line, dict)["step"])
    except OSError:
        pass
    return 0


def read_note(study: Study, run: Run) -> Note:
    """The note of an earlier call; a failed run and one without a note start from the beginning.

    InputError if the run was made with other settings.
    """
    stages: list[Any] = [stage.to_dict() for stage in run.stages] or [run.problem]
    evaluation = [*study.evaluate, *run.variant.evaluate, study.coco, study.test_split]
    digest = fingerprint(stages, evaluation, study.train_split, study.preprocess)
    path = run.folder / RUN_FILE
    try:
        note = Note(**decode_json(path.read_bytes(), dict))
    except (OSError, ValueError, TypeError):
        return Note(digest, "failed", "not made yet")
    if note.status == "failed":
        return replace(note, settings=digest)
    if note.settings != digest:
        raise InputError(
            f"{run.name} was made with other settings",
            where=path,
            remedy=f"remove {run.folder}, or choose another --out",
        )
    return note


def write_note(run: Run, note: Note) -> Note:
    """Writes `run.json` whole or not at all."""
    Storage(str(run.folder)).write(RUN_FILE, json.dumps(asdict(note), indent=1).encode() + b"\n")
    return note


def estimate_hours(study: Study, out: Path) -> list[dict[str, Any]]:
    """A row for each variant: runs, steps a run, and hours of them all, from a short measurement.

    What cannot be measured has None hours and a note. Configurations that differ in the loss alone
    share a measurement.
    """
    runs = plan_runs(study, out)[: len(study.variants)]
    images, seeds = count_images(study, runs), len(study.seeds)
    measured: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for run in runs:
        hours = 0.0
        note = run.problem if run.trains else f"takes the models of {run.variant.trained_by}"
        try:
            for stage in run.stages if run.trains else ():
                values = stage.to_dict()
                values["model"].pop("init", None)  # of the stage before, which is not trained yet
                key = fingerprint(values | {"loss": None, "out": None, "seed": None})
                if key not in measured:
                    log.info("measuring %s", stage.out)
                    measured[key] = measure_step(values)
                made = seeds * stage.total_steps(images) * stage.data.batch
                hours += made * measured[key] / 3.6e6
        except InputError as error:
            note = str(error)
        rows.append(
            {
                "variant": run.variant.name,
                "runs": seeds,
                "steps": run.steps(images),
                "hours": None if run.trains and note else round(hours, 3),
                "note": note,
            }
        )
    return rows


def measure_step(values: Mapping[str, Any]) -> float:
    """Milliseconds an image of training as configured, by `panoptic bench step`."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(tomli_w.dumps(values).encode())
        file.flush()
        command = [*module("cli"), "bench", "step", file.name, "--rounds=1", "--no-compile"]
        found = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise InputError(last_line(found.stderr, found.returncode))
    return min(float(each["fed_ms"]) for each in json.loads(found.stdout)["timings"])
