"""`score --official` against a stand-in for panopticapi, which is on no package index."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run

from panoptic_cache.evaluate.metric.pairs import read_pairs
from panoptic_cache.evaluate.metric.pq import (
    CategoryStat,
    PQStat,
    compare_results,
    import_official,
    run_official,
    summarize,
)
from panoptic_cache.evaluate.metric.score import score_pairs
from panoptic_cache.pipeline.coco import Category

SHARED = Path(__file__).parents[1] / "../shared"
CASES = sorted(p.name for p in (SHARED / "golden/pq").glob("*")) or ["absent"]

STAND_IN = '''
"""As panopticapi: its classes, its division by zero, its printing; what it finds is in a file."""
import json
from collections import defaultdict
from functools import wraps
from pathlib import Path

class PQStatCat:
    def __init__(self, tp=0, fp=0, fn=0, iou=0.0, **_):
        self.tp, self.fp, self.fn, self.iou = tp, fp, fn, iou

class PQStat:
    def __init__(self):
        self.pq_per_cat = defaultdict(PQStatCat)

    def __getitem__(self, i):
        return self.pq_per_cat[i]

    def __iadd__(self, other):
        for label, stat in other.pq_per_cat.items():
            mine = self.pq_per_cat[label]
            for name in ("tp", "fp", "fn", "iou"):
                setattr(mine, name, getattr(mine, name) + getattr(stat, name))
        return self

    def pq_average(self, categories, isthing):
        rows = {}
        for label, info in categories.items():
            stat = self[label]
            if isthing in (None, info["isthing"] == 1) and stat.tp + stat.fp + stat.fn:
                whole = stat.tp + 0.5 * stat.fp + 0.5 * stat.fn
                sq = stat.iou / stat.tp if stat.tp else 0
                rows[label] = {"pq": stat.iou / whole, "sq": sq, "rq": stat.tp / whole}
        means = {k: sum(r[k] for r in rows.values()) / len(rows) for k in ("pq", "sq", "rq")}
        return {**means, "n": len(rows)}, rows

def loud(function):
    @wraps(function)
    def wrapper(*args):
        raise AssertionError("the wrapper prints a traceback of what goes wrong")
    return wrapper

@loud
def pq_compute_single_core(proc_id, annotation_set, gt_folder, pred_folder, categories):
    print("Core: 0, 0 from 1 images processed")
    (gt, pred), = annotation_set
    assert (Path(gt_folder) / gt["file_name"]).is_file()
    assert (Path(pred_folder) / pred["file_name"]).is_file()
    found = Path(__file__).with_name("answer.json")
    total = PQStat()
    if found.exists():  # all of it in the first image
        for label, counts in json.loads(found.read_text()).items():
            total.pq_per_cat[int(label)] = PQStatCat(**counts)
        found.unlink()
    return total
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package `panopticapi` that finds what its `answer.json` says."""
    package = tmp_path / "site" / "panopticapi"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "evaluation.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    forget()
    yield package
    forget()


def forget() -> None:
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
    (stand_in / "answer.json").write_text(json.dumps(answer["per_class"]))
    code, out, _ = run(*command, "--official", "--json")
    assert code == 0
    found = json.loads(out)  # what panopticapi prints is not in it
    assert found["official"]["All"] == answer["All"]
    assert (found["official"]["difference"], found["official"]["at"]) == (0, "nowhere")
    assert {k: v for k, v in found.items() if k != "official"}.keys() == answer.keys()


def test_they_differ(run: Run, command: tuple[object, ...], stand_in: Path) -> None:
    _, out, _ = run(*command, "--json")
    answer = json.loads(out)["per_class"]
    first = next(key for key, row in answer.items() if row["tp"])
    answer[first]["fn"] += 1
    (stand_in / "answer.json").write_text(json.dumps(answer))
    code, out, err = run(*command, "--official")
    assert code == 1
    assert f"1.0e+00, category {first} fn" in err
    assert "All" in out


def test_it_fails(run: Run, command: tuple[object, ...], stand_in: Path) -> None:
    text = STAND_IN.replace("(gt, pred), = annotation_set", "raise KeyError('segment 7')")
    (stand_in / "evaluation.py").write_text(text)
    code, out, err = run(*command, "--official", "--json")
    assert (code, out) == (1, "")
    (line,) = (line for line in err.splitlines() if "images" not in line)
    assert "image 900000001: the official evaluator fails" in line
    assert "KeyError 'segment 7'" in line


def test_it_is_not_installed(run: Run, command: tuple[object, ...]) -> None:
    if importlib.util.find_spec("panopticapi"):
        pytest.skip("panopticapi is installed")
    code, out, err = run(*command, "--official", "--json")
    assert (code, out) == (1, "")
    assert "pip install 'git+https://github.com/cocodataset/panopticapi.git'" in err
    assert len(err.splitlines()) == 1, "said before anything is scored"


def test_undefined_groups_count_as_zero() -> None:
    categories = (Category(3, "disc", True, 0), Category(4, "sky", False, 1))
    ours = summarize(PQStat({3: CategoryStat(tp=1, iou=0.5)}), categories)
    one = {"pq": 0.5, "sq": 0.5, "rq": 1.0, "n": 1}
    row = {"tp": 1, "fp": 0, "fn": 0, "iou": 0.5, **{k: one[k] for k in ("pq", "sq", "rq")}}
    same = {"All": one, "Things": one, "Stuff": None, "per_class": {"3": row}}
    assert compare_results(ours, same)["difference"] == 0
    found = compare_results(ours, {**same, "per_class": {"3": {**row, "rq": 0.9}}})
    assert found["at"] == "category 3 rq"
    assert found["difference"] == pytest.approx(0.1)
    other = compare_results(ours, {**same, "Stuff": one})
    assert (other["at"], other["difference"]) == ("Stuff rq", 1)


@pytest.mark.parametrize("case", CASES)
def test_the_real_one_agrees(case: str) -> None:
    pytest.importorskip("panopticapi.evaluation")
    folder = SHARED / "golden/pq" / case
    if not folder.is_dir():
        pytest.skip("the golden cases are not here")
    if "error" in json.loads((folder / "expected.json").read_text()):
        pytest.skip("both refuse it")
    files = folder / "gt.json", folder / "pred.json"
    ours = score_pairs(*read_pairs(*files)).pq
    assert compare_results(ours, run_official(import_official(), *files))["difference"] == 0
