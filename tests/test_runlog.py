"""What a run writes down: its lines, its trackers, and its curves, true to the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from accelerate import Accelerator
from short_runs import lines_of

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.runlog import (
    HEIGHT,
    POINTS,
    TOP,
    WIDTH,
    RunLog,
    draw_curves,
    installed_trackers,
    keep_lines,
)

SVG = "{http://www.w3.org/2000/svg}"


def step(number: int, task: str, loss: float) -> dict[str, Any]:
    parts = {"pixel": loss / 2, "tv": 0.1, "dice": 0.3 if task == "instance" else 0.0}
    speed = {"lr": 1e-3, "images_per_second": 10.0, "waited": 0.01}
    return {"step": number, "task": task, "loss": loss, **parts, **speed}


def drawn(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> ElementTree.Element:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + tail)
    return ElementTree.fromstring(draw_curves(metrics))


def titles(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text") if text.get("class") == "title"]


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (point.split(",") for point in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_curve_goes_through_its_points(tmp_path: Path) -> None:
    losses = [4.0, 3.0, 1.0]
    picture = drawn(tmp_path, [step(n + 1, "instance", x) for n, x in enumerate(losses)])
    panel = next(picture.iter(f"{SVG}g"))
    loss, *others = [points(line) for line in panel.iter(f"{SVG}polyline")]
    assert len(others) == 3  # pixel, tv, dice
    axis = {
        float(text.text or ""): float(text.attrib["y"]) - 4
        for text in panel.iter(f"{SVG}text")
        if text.get("class") == "y"
    }
    assert min(axis) == 0
    assert min(axis.values()) == pytest.approx(TOP)
    for value, (_, y) in zip(losses, loss, strict=True):
        low, high = axis[min(axis)], axis[max(axis)]
        assert y == pytest.approx(low + (high - low) * value / max(axis), abs=0.11)
    assert [x for x, _ in loss] == sorted(x for x, _ in loss)


def test_long_runs_are_thinned_to_means(tmp_path: Path) -> None:
    lines = [step(n, "instance", 1.0 + n % 2) for n in range(1, POINTS * 8 + 1)]
    loss = points(next(drawn(tmp_path, lines).iter(f"{SVG}polyline")))
    assert len(loss) == POINTS
    assert len({y for _, y in loss}) == 1


def test_held_out_measures_get_panels_of_their_own(tmp_path: Path) -> None:
    lines = [step(n, ("instance", "semantic")[n % 2], 1.0) for n in range(1, 5)]
    assert "held out: measures" not in titles(drawn(tmp_path, lines))
    look = {"step": 4, "validation": {"instance_loss": 1.0, "semantic_loss": 2.0, "pq": 0.5}}
    found = titles(drawn(tmp_path, [*lines, look]))
    assert found[:4] == ["instance task", "semantic task", "held out: losses", "held out: measures"]


def test_each_curve_has_a_colour_and_a_label_of_its_own(tmp_path: Path) -> None:
    names = ("instance_loss", "semantic_accuracy", "code_accuracy", "void_accuracy")
    pqs = ("pq", "pq_things", "pq_stuff", "best", "worst")
    values = dict.fromkeys((*names, *pqs), 0.04976)
    look = {"step": 1, "validation": values}
    picture = drawn(tmp_path, [step(1, "instance", 1.0), look])
    curves = 0
    for panel in picture.iter(f"{SVG}g"):
        colours = [line.attrib["stroke"] for line in panel.iter(f"{SVG}polyline")]
        assert len({*colours}) == len(colours)
        curves += len(colours)
        for label in panel.iter(f"{SVG}text"):
            if "fill" in label.attrib:
                assert float(label.attrib["x"]) + 6.5 * len(label.text or "") <= WIDTH
    assert curves == len(values) + 4 + 2  # the losses of the step, its speed and its rate


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [step(1, "semantic", 0.0)],
        [step(1, "instance", math.nan), step(2, "instance", 1.0)],
        [step(1, "instance", -3.0), step(2, "instance", 1e9)],
    ],
    ids=["nothing", "one", "nan", "wide"],
)
def test_whatever_was_noted_is_drawn(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    picture = drawn(tmp_path, lines, tail='{"step": 3, "ta')
    for line in picture.iter(f"{SVG}polyline"):
        assert all(math.isfinite(x) and 0 <= y <= HEIGHT for x, y in points(line))


class Tracker:
    """W&B's, as Accelerate makes it."""

    name = "wandb"
    settings: object = None

    def store_init_configuration(self, values: object) -> None:
        self.settings = values


class Tracked:
    """An accelerator with W&B, which is not installed for the tests."""

    log_with = ("wandb",)
    is_main_process = True

    def __init__(self) -> None:
        self.trackers = [Tracker()]
        self.options: dict[str, Any] = {}

    def init_trackers(self, _: str, init_kwargs: dict[str, dict[str, Any]]) -> None:
        self.options = init_kwargs["wandb"]


def test_wandb_gets_the_settings_and_goes_on_in_one_run(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    options = []
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        accelerator = Tracked()
        RunLog(cast(Accelerator, accelerator), folder, 0, {"steps": 7})
        assert accelerator.trackers[0].settings == {"steps": 7}
        options.append(accelerator.options)
    assert options[0] == options[1]
    assert options[0]["resume"] == "allow"
    assert options[0]["id"] != options[2]["id"]


def test_a_run_leaves_its_picture(trained: Path) -> None:
    assert "instance task" in titles(ElementTree.parse(trained / "curves.svg").getroot())


def test_a_cut_line_and_later_lines_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    keep_lines(metrics, 3)
    assert metrics.read_text() == ""
    metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    keep_lines(metrics, 3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    metrics.write_text('{"step": 1}\n{"step": 2, "lo')
    keep_lines(metrics, 3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "row",
    [
        *("null", "[]", "3", '"step"', "{}", '{"step": "3"}', '{"step": 3, "loss": "low"}'),
        *('{"task": "instance"}', '{"step": 3, "validation": 1}', "\udcff", "[" * 20_000),
        *('{"step": 3, "validation": {"pq": null}}', '{"step": 3, "task": "instance", "lr": []}'),
    ],
)
def test_a_damaged_row_is_dropped(tmp_path: Path, row: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps(step(1, "instance", 2.0)), row, json.dumps(step(2, "semantic", 2.0))]
    metrics.write_bytes("\n".join(lines).encode(errors="surrogateescape") + b"\n")
    ElementTree.fromstring(draw_curves(metrics))
    keep_lines(metrics, 9)
    assert lines_of(tmp_path) == [step(1, "instance", 2.0), step(2, "semantic", 2.0)]


def test_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such tracker: tensorbord"):
        installed_trackers(["tensorbord"])
    monkeypatch.setattr("panoptic_cache.train.runlog.get_available_trackers", list)
    assert installed_trackers(["tensorboard"]) == []
