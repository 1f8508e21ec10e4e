"""docs/own-data.md: its commands run as they stand, on images that are made on the spot."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from panoptic_cache.train.stages import load_stages

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "own-data.md").read_text()
COMMANDS = re.findall(
    "^    (panoptic .*)$",
    TEXT[TEXT.index("## The whole way") : TEXT.index("## What it gives")],
    re.MULTILINE,
)
QUICK = ["steps=2", "data.batch=4", "model.random.layers=2", "model.taps=[1,2]", "ema=0.5"]


def write_nuclei(folder: Path, count: int, seed: int) -> int:
    """Pale discs on black and an integer map of them; returns how many there are."""
    random, total = np.random.default_rng(seed), 0
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        height, width = random.integers(60, 300, 2)
        ids = np.zeros((height, width), np.uint16)
        y, x = np.ogrid[:height, :width]
        for nucleus in range(1, 9):
            v, u, radius = random.integers([10, 10, 5], [height - 10, width - 10, 15])
            ids[((y - v) ** 2 + (x - u) ** 2 <= radius**2) & (ids == 0)] = nucleus
        photo = np.where(ids > 0, 90, 10) + random.normal(0, 5, ids.shape)
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / f"images/{number}.png")
        Image.fromarray(ids).save(folder / f"masks/{number}.png")
        total += len(np.unique(ids)) - 1
    return total


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nuclei = (
        write_nuclei(tmp_path / "nuclei/train", 6, 0),
        write_nuclei(tmp_path / "nuclei/val", 3, 1),
    )
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "train":
            words += [word for setting in QUICK for word in ("--set", setting)]
        code, said, err = run(*words)
        assert code == 0, f"{command}: {said} {err}"
    for split, count in zip(("train", "val"), nuclei, strict=True):
        path = tmp_path / f"datasets/nuclei/annotations/panoptic_{split}.json"
        rows = json.loads(path.read_text())["annotations"]
        assert sum(len(row["segments_info"]) for row in rows) == count + len(rows)
    scores = json.loads((tmp_path / "runs/nuclei/val/scores.json").read_text())
    assert scores["images"] == 3
    assert len(list((tmp_path / "runs/nuclei/photos/panoptic").iterdir())) == 3


def test_the_page_names_what_is_there() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_a_configuration_that_ships_loads(path: Path) -> None:
    for stage in load_stages(path):
        assert stage.data.size >= 1
        assert stage.out.startswith("runs/")
