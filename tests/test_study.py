"""Studies: the file, the runs and how they end, the table, the charts and the page."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from statistics import stdev
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import Run as Command
from short_runs import TINY_TOML
from test_browser import BROWSER, FLAGS

from panoptic_cache.evaluate.runs import execute
from panoptic_cache.evaluate.runs.page import code_curves, draw_chart
from panoptic_cache.evaluate.runs.results import (
    mean_curve,
    mean_sizes,
    over_seeds,
    read_curve,
    spread_text,
)
from panoptic_cache.evaluate.runs.study import plan_runs, read_study
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import Interrupted, interruptible
from panoptic_cache.train.runlog import round_ticks

STUDIES = Path(__file__).parents[1] / "studies"
STUDY = """
title = "Void & EDS"
config = "{config}"
coco = "{coco}"
train_split = "train"
test_split = "val"
seeds = [0, 1]
curve_every = 2
set = ["steps=2"]
preprocess = ["--fit=squash", "--size=56", "--workers=0"]
evaluate = ["--overlays=1"]

[[variants]]
name = "Both"
paper = 48.61

[[variants]]
name = "No void"
set = ["loss.include_void=false"]

[[variants]]
name = "Wrong"
set = ["loss.edss=false"]

[[variants]]
name = "Both, mirrored"
trained_by = "Both"
evaluate = ["--flip"]
"""
# Stands in for the commands: notes that it was called, and leaves what they leave.
FAKE = """
import json, pathlib, sys, time
arguments = sys.argv[1:]
with open({calls!r}, "a") as file:
    file.write(json.dumps(arguments) + "\\n")
def value(name):
    return pathlib.Path(arguments[arguments.index(name) + 1])
if arguments[0] == "preprocess":
    value("--out").mkdir(parents=True)
    (value("--out") / "index.json").write_text("complete")
elif arguments[0] == "evaluate":
    value("--out").mkdir(parents=True, exist_ok=True)
    (value("--out") / "scores.json").write_text("{{}}")
else:
    out = pathlib.Path([each for each in arguments if each.startswith("out=")][0][4:])
    out.mkdir(parents=True, exist_ok=True)
    if "loss.include_void=false" in arguments and "seed=1" in arguments and {fails}:
        print("panoptic: loss is not finite at step 2", file=sys.stderr)
        sys.exit(1)
    if {waits}:
        (out / "waits").touch()
        time.sleep(60)
    lines = ['{{"step": 1}}', '{{"step": 2, "validation": {{"pq": 0.5}}}}']
    (out / "metrics.jsonl").write_text("\\n".join(lines))
"""


@pytest.fixture
def study_file(tmp_path: Path, tiny_root: Path) -> Path:
    """A study of four variants, one of them with a setting that does not exist."""
    config = tmp_path / "tiny.toml"
    config.write_text(TINY_TOML)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(config=config, coco=tiny_root))
    return path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the commands by `FAKE`; gives a function that reads their calls."""
    calls = tmp_path / "calls.jsonl"
    script = tmp_path / "fake.py"

    def install(*, fails: bool = False, waits: bool = False) -> list[list[str]]:
        script.write_text(FAKE.format(calls=str(calls), fails=fails, waits=waits))
        found = [json.loads(line) for line in calls.read_text().splitlines()]
        calls.write_text("")
        return found

    calls.write_text("")
    monkeypatch.setattr(execute, "module", lambda *_: [sys.executable, str(script)])
    return install


def test_a_study_makes_each_run_once_and_notes_what_fails(
    study_file: Path, tmp_path: Path, commands: Any
) -> None:
    study, out = read_study(study_file), tmp_path / "out"
    commands(fails=True)
    notes = execute.run_study(study, out)
    kinds = [call[0] for call in commands()]
    assert kinds.count("preprocess") == 2
    assert kinds.count("evaluate") == 5  # Both and mirrored twice, No void once
    states = {f"{f.parent.name}/{f.name}": note.status for f, note in notes.items()}
    assert states == {
        "both/seed-0": "done",
        "both/seed-1": "done",
        "no-void/seed-0": "done",
        "no-void/seed-1": "failed",
        "wrong/seed-0": "failed",
        "wrong/seed-1": "failed",
        "both-mirrored/seed-0": "done",
        "both-mirrored/seed-1": "done",
    }
    assert "loss is not finite at step 2" in notes[out / "no-void/seed-1"].line
    assert "did you mean eds?" in notes[out / "wrong/seed-0"].line
    # What is done is left alone; what failed is tried again.
    assert execute.run_study(study, out)[out / "no-void/seed-1"].status == "done"
    again = commands()
    assert [call[0] for call in again if call[0] == "evaluate"] == ["evaluate"]
    assert len(again) == 2


def test_a_study_that_is_stopped_goes_on(study_file: Path, tmp_path: Path, commands: Any) -> None:
    study, out = read_study(study_file), tmp_path / "out"
    commands(waits=True)
    waits = out / "both" / "seed-0" / "train" / "waits"

    def stop() -> None:
        while not waits.exists():
            threading.Event().wait(0.05)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted, match="run the same command"), interruptible():
        execute.run_study(study, out)
    thread.join()
    commands()
    assert execute.run_study(study, out)[out / "both/seed-0"].status == "done"
    assert "preprocess" not in [call[0] for call in commands()]


def test_runs_of_other_settings_are_not_mixed(
    study_file: Path, tmp_path: Path, commands: Any
) -> None:
    commands()
    execute.run_study(read_study(study_file), tmp_path / "out")
    study_file.write_text(study_file.read_text().replace("steps=2", "steps=3"))
    with pytest.raises(InputError, match="Both, seed 0 was made with other settings"):
        execute.run_study(read_study(study_file), tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "No void"', 'name = "Both"', "two variants 'Both'"),
        ('name = "No void"', 'name = "both!"', "two variants whose folder is 'both'"),
        ("paper = 48.61", "papers = 48.61", "did you mean paper"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "names a seed twice"),
        ("seeds = [0, 1]", 'base = "Neither"', "no variant 'Neither'"),
        ('trained_by = "Both"', 'trained_by = "Nobody"', "no variant 'Nobody' that trains"),
        ("[[variants]]", "[[variant]]", "did you mean variants"),
    ],
)
def test_a_wrong_study_file_is_one_line(
    study_file: Path, old: str, new: str, message: str, run: Command
) -> None:
    study_file.write_text(study_file.read_text().replace(old, new))
    code, _, errors = run("study", study_file, "--out", study_file.parent / "out")
    assert code == 1
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_the_order_of_runs_puts_every_variant_before_the_next_seed(study_file: Path) -> None:
    runs = plan_runs(read_study(study_file), Path("out"))
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    mirrored = next(run for run in runs if run.variant.trained_by)
    assert mirrored.train_folder == Path("out/both/seed-0/train")


def test_a_base_of_stages_is_trained_and_counted_whole(
    study_file: Path, tmp_path: Path, commands: Any
) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(TINY_TOML + "[[stages]]\ntasks = {instance = 1, semantic = 0}\n[[stages]]\n")
    study, out = read_study(study_file), tmp_path / "out"
    run = plan_runs(study, out)[0]
    first, second = run.stages
    assert second.model.init == first.out == str(out / "both/seed-0/train/stage-1")
    assert run.steps(100) == 4  # two of two
    for stage, pq in ((first, 0.25), (second, 0.5)):
        Path(stage.out).mkdir(parents=True)
        line = {"step": 2, "validation": {"pq": pq}}
        (Path(stage.out) / "metrics.jsonl").write_text(json.dumps(line))
    assert [*read_curve(run)] == [(2, 25.0), (4, 50.0)]
    commands()
    assert execute.run_study(study, out)[run.folder].status == "done"
    assert ["--resume" in call for call in commands() if "seed=0" in call] == [True] * 2


def test_a_dry_run_measures_each_model_once(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(TINY_TOML + "[[stages]]\ntasks = {instance = 1, semantic = 0}\n[[stages]]\n")
    measure = Mock(return_value=4500.0)
    monkeypatch.setattr(execute, "measure_step", measure)
    both, no_void, wrong, mirrored = execute.estimate_hours(read_study(study_file), tmp_path / "x")
    assert measure.call_count == 2  # stages; variants differ in the loss alone
    assert both["hours"] == no_void["hours"] == pytest.approx(2 * 4 * 4 * 4.5 / 3600, abs=5e-4)
    assert (both["runs"], both["steps"]) == (2, 4)
    assert wrong["hours"] is None
    assert "did you mean eds" in wrong["note"]
    assert (mirrored["hours"], mirrored["note"]) == (0, "takes the models of Both")


def test_a_study_of_trained_runs_trains_nothing(
    study_file: Path, tmp_path: Path, commands: Any
) -> None:
    text = study_file.read_text().replace('trained_by = "Both"', 'trained_by = "old/seed-{seed}"')
    study_file.write_text(text[: text.index("[[variants]]")] + text[text.rindex("[[variants]]") :])
    commands()
    execute.run_study(read_study(study_file), tmp_path / "out")
    calls = commands()
    assert [call[0] for call in calls] == ["evaluate"] * 2
    found = [call[call.index("--checkpoint") + 1] for call in calls]
    assert found == ["old/seed-0", "old/seed-1"]


def test_measures_over_seeds() -> None:
    found = over_seeds([0.5, None, 0.6, 0.7])
    assert found is not None
    assert [*found.values()] == pytest.approx([60, stdev([50, 60, 70])])
    assert spread_text(over_seeds([0.5])) == "50.0"
    assert spread_text(over_seeds([0.01, 0.03]), "+") == "+2.0 ± 1.4"
    assert spread_text(over_seeds([-0.0004]), "+") == "+0.0"
    assert over_seeds([None]) is None
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 8.0), (3, 1.0)]]) == [(2, 6.0)]


def test_sizes_of_a_few_instances_are_left_out() -> None:
    rows = [{"from": 0, "to": 8, "n": 9, "iou": 0.1}, {"from": 8, "to": None, "n": 10, "iou": 0.5}]
    assert mean_sizes([{"sizes": rows}]) == [("8+ px", 50.0)]


def test_the_codes_have_the_contrast_of_the_paper() -> None:
    _, ratios = code_curves()
    assert ratios["coordinate, L1"] == pytest.approx(79)
    assert ratios["positional, L = 4"] == pytest.approx(4.91, abs=0.005)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.5, 0.002), (47.2, 48.9), (3, 3), (0, 92e3)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    found = round_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
    steps = {round(b - a, 6) for a, b in pairwise(found)}
    assert len(steps) == 1


def test_a_chart_keeps_to_its_box() -> None:
    chart = draw_chart({"one": [(0, 1.0), (10, 3.0)], "none": []})
    assert chart is not None
    ((_, _, path),) = chart.lines
    assert path == "44.0,204.0 640.0,14.0"
    assert draw_chart({"none": []}) is None


@pytest.mark.slow
def test_a_study_from_photos_to_its_page(study_file: Path, tmp_path: Path, run: Command) -> None:
    out = tmp_path / "out"
    study_file.write_text(study_file.read_text().replace("seeds = [0, 1]", "seeds = [3]"))
    code, text, _ = run("study", study_file, "--out", out, "--json")
    values = json.loads(text)
    assert code == 3  # one variant is wrong
    rows = {row["variant"]: row for row in values["rows"]}
    for name in ("Both", "No void", "Both, mirrored"):
        folder = out / name.lower().replace(",", "").replace(" ", "-")
        scores = json.loads((folder / "seed-3" / "evaluate" / "scores.json").read_text())
        assert rows[name]["All"]["mean"] == pytest.approx(100 * scores["All"]["pq"])
    assert rows["Both"]["paper"] == 48.61
    assert [each["seed"] for each in rows["Wrong"]["failed"]] == [3]
    page = Path(values["page"])
    assert "Void &amp; EDS" in page.read_text()
    if BROWSER is None:
        pytest.skip("no browser on this machine: the page was not opened")
    dom = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert dom.stdout.count("<polyline") >= 6
    assert "CONSOLE" not in dom.stderr
    shutil.rmtree(tmp_path / "browser", ignore_errors=True)


@pytest.mark.parametrize("path", sorted(STUDIES.rglob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_ship_can_be_trained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STUDIES.parent)
    study = read_study(path)
    for run in plan_runs(study, Path("out")):
        assert run.stages
