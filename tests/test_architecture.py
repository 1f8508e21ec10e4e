"""The direction of the arrows: cli -> evaluate -> train -> pipeline, and no torch in pipeline."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("pipeline", "train", "evaluate", "cli")
"""From the bottom to the top."""

FILES = sorted(
    path for layer in LAYERS for path in (*ROOT.glob(f"{layer}/**/*.py"), *ROOT.glob(f"{layer}.py"))
)


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_down(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imported(path)}
    above = LAYERS[LAYERS.index(layer(path)) + 1 :]
    assert not tops & {*above, "tests", "handmade", "conftest"}
    assert not tops & {"torchvision", "timm", "streaming", "wids"}
    if layer(path) == "pipeline":
        # webdataset and accelerate import torch.
        assert not tops & {"torch", "webdataset", "accelerate", "transformers", "safetensors"}


def test_every_layer_is_looked_at() -> None:
    assert {layer(path) for path in FILES} >= {"pipeline", "train", "evaluate"}


def test_the_pipeline_runs_without_torch() -> None:
    modules = [f"pipeline.{path.stem}" for path in FILES if layer(path) == "pipeline"]
    script = (
        f"import sys, {', '.join(modules)}\n"
        "print(*sorted({'torch', 'torchvision', 'transformers', 'webdataset'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_nothing_asks_for_torchvision() -> None:
    assert "torchvision" not in {
        name.partition(".")[0] for path in ROOT.glob("tests/*.py") for name in imported(path)
    }
    wanted = [
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "torchvision" in line
    ]
    assert all("msg" in line for line in wanted)
