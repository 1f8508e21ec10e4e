"""`score --official` against a stand-in for panopticapi, which is on no package index."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run

from evaluate.official import compare_results

STAND_IN = """
import json
from pathlib import Path

def pq_compute(gt_json_file, pred_json_file, gt_folder=None, pred_folder=None):
    print("Evaluation panoptic segmentation metrics:")
    assert all(part is None or isinstance(part, str) for part in (gt_folder, pred_folder))
    return json.loads(Path(__file__).with_name("answer.json").read_text(), object_hook=numbered)

def numbered(row):  # categories are numbers there, not strings
    return {int(key) if key.isdigit() else key: value for key, value in row.items()}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package `panopticapi` that answers with its `answer.json`."""
    package = tmp_path / "site" / "panopticapi"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "evaluation.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    yield package
    for name in [name for name in sys.modules if name.startswith("panopticapi")]:
        del sys.modules[name]


@pytest.fixture
def command(tiny_root: Path) -> tuple[object, ...]:
    """Scores the annotations against themselves."""
    truth = tiny_root / "annotations" / "panoptic_val.json"
    return "score", truth, truth


def test_they_agree(run: Run, command: tuple[object, ...], stand_in: Path) -> None:
    _, out, _ = run(*command, "--json")
    answer = json.loads(out)
    answer["per_class"] = {
        k: {name: v[name] + 1e-15 for name in ("pq", "sq", "rq")}
        for k, v in answer["per_class"].items()
    }
    (stand_in / "answer.json").write_text(json.dumps(answer))
    code, out, _ = run(*command, "--official", "--json")
    assert code == 0
    found = json.loads(out)  # what panopticapi prints is not in it
    assert found["official"]["All"] == answer["All"]
    assert found["official"]["difference"] < 1e-14
    assert {k: v for k, v in found.items() if k != "official"}.keys() == answer.keys()


def test_they_differ(run: Run, command: tuple[object, ...], stand_in: Path) -> None:
    _, out, _ = run(*command, "--json")
    answer = json.loads(out)
    answer["Things"]["sq"] -= 0.25
    (stand_in / "answer.json").write_text(json.dumps(answer))
    code, out, err = run(*command, "--official")
    assert code == 1
    assert "2.5e-01, Things sq" in err
    assert "All" in out


def test_it_fails(run: Run, command: tuple[object, ...], stand_in: Path) -> None:
    (stand_in / "evaluation.py").write_text("def pq_compute(*a): return 1 / 0\n")
    code, out, err = run(*command, "--official", "--json")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError" in err
    assert len(err.splitlines()) == 1


def test_it_is_not_installed(run: Run, command: tuple[object, ...]) -> None:
    if importlib.util.find_spec("panopticapi"):
        pytest.skip("panopticapi is installed")
    code, out, err = run(*command, "--official", "--json")
    assert (code, out) == (1, "")
    assert "pip install 'git+https://github.com/cocodataset/panopticapi.git'" in err
    assert len(err.splitlines()) == 1


def test_undefined_groups_count_as_zero() -> None:
    empty = {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}
    one = {"pq": 0.5, "sq": 0.5, "rq": 1.0, "n": 1}
    ours = {"All": one, "Things": one, "Stuff": None, "per_class": {"3": {**one, "tp": 1}}}
    theirs = {"All": one, "Things": one, "Stuff": empty, "per_class": {3: {**one, "rq": 0.9}}}
    found = compare_results(ours, theirs)
    assert found.at == "category 3 rq"
    assert not found.agrees
