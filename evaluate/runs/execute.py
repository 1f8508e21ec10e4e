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
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from panoptic_cache.evaluate.runs.study import Run, Study, plan_runs, run_config, trained_runs
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
    """Renders, trains and evaluates what is missing.

    Args:
        study: The study file.
        out: Its folder.
        launcher: Such as `accelerate launch --num_processes 8`; runs training and evaluation.

    Returns:
        The note of each run, by its folder.

    Raises:
        InputError: A cache cannot be rendered, or a run of other settings lies in the folder.
    """
    storage = Storage(str(out))
    storage.create()
    with storage.locked():
        runs = plan_runs(study, out)
        digests = {run.folder: run_digest(study, run) for run in runs}
        notes = {run.folder: read_note(run, digests[run.folder]) for run in runs}
        for name in ("train", "test") if study.curve_every else ("train",):
            render_cache(study, out, name)
        images = len(read_dataset(CocoLayout.of(Path(study.coco), study.train_split)).records)
        totals = {run.folder: run_steps(study, run, images) for run in trained_runs(runs)}
        finished = [run for run in runs if notes[run.folder].status in {"trained", "done"}]
        done = sum(totals.get(run.folder, 0) for run in finished)
        with progress("study", sum(totals.values()), "steps", done) as advance:
            for run in runs:
                note = notes[run.folder]
                if note.status == "done":
                    continue
                total = totals.get(run.folder, 0)
                note = make_run(study, run, note, launcher, partial(advance, note=run.name))
                notes[run.folder] = note
                if note.status == "failed":
                    log.error("%s failed: %s", run.name, note.line)
                    advance(max(0, total - last_step(run.train_folder)), f"{run.name} failed")
    return notes


def make_run(
    study: Study, run: Run, note: Note, launcher: Sequence[str], advance: Callable[[int], None]
) -> Note:
    """Trains and evaluates one run, and notes how it ended."""
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        if note.status != "trained" and not run.variant.trained_by:
            start = time.monotonic()
            run_config(study, run)
            settings = [part for setting in run.settings for part in ("--set", setting)]
            arguments = [study.config, *settings, "--resume"]
            call(run, [*module("train", launcher), *arguments], advance)
            hours = note.hours + (time.monotonic() - start) / 3600
            note = write_note(run, Note(note.settings, "trained", hours=hours))
        dataset = ["--coco", study.coco, "--split", study.test_split]
        folders = ["--checkpoint", str(run.train_folder), "--out", str(run.folder / "evaluate")]
        options = [*study.evaluate, *run.variant.evaluate]
        call(run, [*module("cli", launcher), "evaluate", *folders, *dataset, *options])
        return write_note(run, Note(note.settings, "done", hours=note.hours))
    except InputError as error:
        return write_note(run, Note(note.settings, "failed", str(error), note.hours))


def module(name: str, launcher: Sequence[str]) -> list[str]:
    """How a program of ours is started."""
    return [*(launcher or [sys.executable]), "-m", f"panoptic_cache.{name}"]


def call(run: Run, command: Sequence[str], advance: Callable[[int], None] | None = None) -> None:
    """Runs a command with its messages in the run's log; tells the steps that it makes.

    Raises:
        InputError: It failed; the message is its last line.
        Interrupted: Somebody asked to stop. The command was told so, and has ended.
    """
    path = run.folder / LOG_FILE
    before = last_step(run.train_folder) if advance else 0
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
                if advance and (step := last_step(run.train_folder)) > before:
                    advance(step - before)
                    before = step
        except Interrupted as stop:
            process.terminate()
            process.wait()
            stop.advice = "run the same command to go on"
            raise
    if process.returncode:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        raise InputError(lines[-1], where=path)


def render_cache(study: Study, out: Path, name: str) -> None:
    """Renders the cache `train` or `test`, unless it is complete.

    Raises:
        InputError: `panoptic preprocess` failed; its messages are on the terminal.
    """
    folder = out / "cache" / name
    if (folder / INDEX_NAME).exists():
        return
    split = study.train_split if name == "train" else study.test_split
    options = ["--coco", study.coco, "--split", split, "--out", str(folder), *study.preprocess]
    command = [*module("cli", ()), "preprocess", *options]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise InputError(f"panoptic preprocess failed with code {code}", where=folder)


def run_steps(study: Study, run: Run, images: int) -> int:
    """Optimizer steps of a run; 0 if its settings are wrong, which its row will say."""
    with suppress(InputError):
        return run_config(study, run).total_steps(images)
    return 0


def last_step(folder: Path) -> int:
    """The last step that a run has logged; 0 for none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            for line in reversed(file.read().splitlines()):
                with suppress(ValueError, TypeError, KeyError):
                    return int(decode_json(line, dict)["step"])
    except OSError:
        pass
    return 0


def run_digest(study: Study, run: Run) -> str:
    """Digest of everything that a run's result depends on."""
    try:
        training: Any = run_config(study, run).to_dict()
    except InputError as error:
        training = str(error)
    evaluation = [*study.evaluate, *run.variant.evaluate, study.coco, study.test_split]
    return fingerprint(training, evaluation, study.train_split, study.preprocess)


def read_note(run: Run, digest: str) -> Note:
    """The note of an earlier call; a failed run and one without a note start from the beginning.

    Raises:
        InputError: The run was made with other settings.
    """
    path = run.folder / RUN_FILE
    fresh = Note(digest, "failed", "not made yet")
    try:
        note = Note(**decode_json(path.read_bytes(), dict))
    except (OSError, ValueError, TypeError):
        return fresh
    if note.status == "failed":
        return Note(digest, "failed", note.line, note.hours)
    if note.settings != digest:
        raise InputError(
            f"{run.name} was made with other settings",
            where=path,
            remedy=f"remove {run.folder}, or choose another --out",
        )
    return note


def write_note(run: Run, note: Note) -> Note:
    """Writes `run.json` whole or not at all."""
    values = {name: getattr(note, name) for name in Note.__slots__}
    Storage(str(run.folder)).write(RUN_FILE, json.dumps(values, indent=1).encode() + b"\n")
    return note


def estimate_hours(study: Study, out: Path) -> list[tuple[str, int, int, float | None, str]]:
    """Variant, runs, steps a run, and hours for all of its runs, from a short measurement.

    A configuration that cannot be measured has None and the reason. Variants that differ in the
    loss alone share a measurement.
    """
    images = len(read_dataset(CocoLayout.of(Path(study.coco), study.train_split)).records)
    measured: dict[str, float] = {}
    rows: list[tuple[str, int, int, float | None, str]] = []
    for run in plan_runs(study, out)[: len(study.variants)]:
        name, count = run.variant.name, len(study.seeds)
        if run.variant.trained_by:
            rows.append((name, count, 0, 0.0, f"takes the models of {run.variant.trained_by}"))
            continue
        try:
            config = run_config(study, run)
            steps = config.total_steps(images)
            key = fingerprint(config.to_dict() | {"loss": None, "out": None, "seed": None})
            if key not in measured:
                log.info("measuring %s", name)
                measured[key] = measure_step(study, run)
        except InputError as error:
            rows.append((name, count, 0, None, str(error)))
            continue
        hours = count * steps * config.data.batch * measured[key] / 3.6e6
        rows.append((name, count, steps, hours, ""))
    return rows


def measure_step(study: Study, run: Run) -> float:
    """Milliseconds an image of training as configured, by `panoptic bench step`."""
    settings = [part for setting in run.settings for part in ("--set", setting)]
    command = [*module("cli", ()), "bench", "step", study.config, *settings, "--rounds", "1"]
    found = subprocess.run(
        [*command, "--no-compile", "--json"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.strip()]
        raise InputError(lines[-1] if lines else f"failed with code {found.returncode}")
    return min(float(each["fed_ms"]) for each in json.loads(found.stdout)["timings"])
