"""The arrows between packages, as one table: who may import whom; and no torch in `pipeline`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = "panoptic_cache"
FORBIDDEN = {"torchvision", "timm", "streaming", "wids"}
NEEDS_TORCH = {"torch", "webdataset", "accelerate", "transformers", "safetensors"}

ARROWS = {
    "pipeline.base": "",
    "pipeline": "pipeline.base",
    "pipeline.cache": "pipeline.base pipeline",
    "pipeline.render": "pipeline.base pipeline pipeline.cache pipeline.scenes",
    "pipeline.scenes": "pipeline.base pipeline",
    "pipeline.convert": "pipeline.base pipeline",
    "pipeline.convert.commands": "pipeline.* pipeline.console",
    "pipeline.pictures": "pipeline.base pipeline pipeline.cache",
    "pipeline.console": "pipeline.base pipeline pipeline.render",
    "pipeline.commands": "pipeline.* pipeline.console",
    "train": "pipeline.*",
    "train.commands": "pipeline.* pipeline.console train",
    "evaluate.decoder": "pipeline.base pipeline train",
    "evaluate.export": "pipeline.base pipeline train evaluate.decoder",
    "evaluate.metric": "pipeline.base pipeline",
    "evaluate.report": "pipeline.base pipeline pipeline.pictures evaluate.metric evaluate.decoder",
    "evaluate.study": "pipeline.* train evaluate.decoder evaluate.metric",
    "evaluate.study.commands": "pipeline.* pipeline.console train evaluate.*",
    "evaluate": "pipeline.* train evaluate.decoder evaluate.metric evaluate.report"
    " evaluate.study",  # for saved heads, which studies read
    "evaluate.runs": "pipeline.* train evaluate evaluate.report",
    "evaluate.runs.commands": "pipeline.* pipeline.console evaluate.runs",
    "evaluate.commands": "pipeline.* pipeline.console train evaluate.*",
    "cli": "pipeline.base pipeline.console pipeline.commands pipeline.convert.commands"
    " train.commands evaluate.commands evaluate.runs.commands evaluate.study.commands",
}
"""What the files of a package may import beside their own: packages without their sub-packages, or
`name.*` for a package with them. What is not in the table may not be imported: commands, by none
but `cli`."""
COMMAND_LINE = {"commands", "console", "__main__"}


def package(path: Path) -> str:
    """The row of the table that a file belongs to; the command line has rows of its own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if ".".join(parts) in ARROWS:
        return ".".join(parts)
    if parts[-1] in COMMAND_LINE:
        return ".".join((*parts[:-1], parts[-1].replace("__main__", "commands")))
    return ".".join(parts if len(parts) == 1 else parts[:-1])


FILES = {
    name: [
        path
        for top in ("pipeline", "train", "evaluate", "cli.py")
        for path in ([ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py")))
        if package(path) == name
    ]
    for name in ARROWS
}


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def owner(module: str) -> str:
    """The package of the table that a module of ours lies in."""
    name = module.removeprefix(f"{TOP}.")
    return max((key for key in ARROWS if f"{name}.".startswith(f"{key}.")), key=len)


@pytest.mark.parametrize("name", ARROWS)
def test_arrows(name: str) -> None:
    allowed = {name}
    for entry in ARROWS[name].split():
        top = entry.removesuffix(".*")
        below = {key for key in ARROWS if key.startswith(f"{top}.")} if top != entry else set()
        allowed |= {top} | {key for key in below if key.split(".")[1] not in COMMAND_LINE}
    assert FILES[name], "the table names a package that is not there"
    for path in FILES[name]:
        modules = [*imported(path)]
        found = {owner(module) for module in modules if module.startswith(f"{TOP}.")}
        assert found <= allowed, f"{path}: {found - allowed}"
        tops = {module.partition(".")[0] for module in modules}
        banned = {"pipeline", "train", "evaluate", "cli", "tests"} | FORBIDDEN
        if name.startswith("pipeline"):
            banned |= NEEDS_TORCH
        assert not tops & banned, f"{path}: {tops & banned}"


def test_every_file_is_in_the_table() -> None:
    listed = {path for paths in FILES.values() for path in paths}
    assert listed == {
        path for top in ("pipeline", "train", "evaluate") for path in (ROOT / top).rglob("*.py")
    } | {ROOT / "cli.py"}


def test_evaluate_has_few_entries() -> None:
    entries = {path.name for path in (ROOT / "evaluate").iterdir()} - {"__pycache__"}
    assert len(entries) <= 14, entries


@pytest.mark.slow
def test_the_pipeline_runs_without_torch() -> None:
    modules = [
        ".".join((TOP, *path.relative_to(ROOT).with_suffix("").parts))
        for name, paths in FILES.items()
        if name.startswith("pipeline")
        for path in paths
    ]
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
