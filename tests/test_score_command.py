"""`panoptic score` as a process: what it imports, how it shares work, how it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import psutil  # type: ignore[import-untyped]
import pytest
from conftest import Run

from panoptic_cache.evaluate.metric import score as score_module
from panoptic_cache.evaluate.metric.pairs import read_pairs
from panoptic_cache.evaluate.metric.score import score_pairs, useful_workers
from panoptic_cache.pipeline.base import process as processes
from panoptic_cache.pipeline.base.terminal import progress, table

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "skimage", "scipy", "pycocotools", "PIL", "dask", "matplotlib"),
    *("pydantic", "rich", "multiprocessing", "concurrent"),
}
"""Each takes as long to import as several images to score."""

LOADED = """
import json, sys
from panoptic_cache import cli
sys.argv = ["panoptic", *json.loads(sys.argv[1])]
try:
    cli.main()
finally:
    sys.stderr.write("LOADED " + " ".join({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture
def truth(tiny_root: Path) -> Path:
    return tiny_root / "annotations" / "panoptic_train.json"


def alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a fresh interpreter, which has one thread."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("style", [(), ("--json",)])
def test_it_imports_nothing_that_takes_longer_than_a_few_images(
    truth: Path, style: tuple[str, ...]
) -> None:
    arguments = json.dumps(["score", str(truth), str(truth), "--workers", "1", *style])
    done = subprocess.run(
        [sys.executable, "-c", LOADED, arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "All" in done.stdout
    loaded = set(done.stderr.rpartition("LOADED ")[2].split())
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_help_lists_it() -> None:
    done = alone("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("score", "inspect", "bench"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_score_the_same_however_they_start(
    truth: Path, method: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from panoptic_cache import cli\n"
        "from panoptic_cache.pipeline.base import process\n"
        f"process._context = lambda: multiprocessing.get_context({method!r})\n"
        "if __name__ == '__main__':\n"
        "    cli.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "score", str(truth), str(truth), "--json"]
    one, three = (
        subprocess.run(
            [*command, "--workers", workers], capture_output=True, check=True, env=environment
        )
        for workers in ("1", "3")
    )
    assert json.loads(one.stdout)["All"]["pq"] == 1
    assert three.stdout == one.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells the threads")
def test_it_forks_only_where_no_other_thread_runs() -> None:
    script = (
        "import threading\n"
        "from panoptic_cache.pipeline.base.process import _context\n"
        "print(_context().get_start_method())\n"
        "wait = threading.Event()\n"
        "threading.Thread(target=wait.wait).start()\n"
        "print(_context().get_start_method())\n"
        "wait.set()\n"
    )
    # As the command does: else numpy starts threads for linear algebra.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["fork", "spawn"]


def wait_for_signal(*_: object, **__: object) -> None:
    signal.pause()


def share_for_ever(json_file: str) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(score_module, "read_ids", wait_for_signal)
    patch.setattr(processes, "_context", lambda: multiprocessing.get_context("fork"))
    score_pairs(*read_pairs(Path(json_file), Path(json_file)), workers=2)


@pytest.mark.slow
def test_workers_end_with_a_process_that_was_killed(truth: Path) -> None:
    code = f"import test_score_command; test_score_command.share_for_ever({str(truth)!r})"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [MemoryError(), cv2.error("OpenCV: Insufficient memory")])
def test_out_of_memory_names_the_image(
    run: Run, truth: Path, monkeypatch: pytest.MonkeyPatch, workers: int, error: Exception
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise error

    if isinstance(error, cv2.error):
        error.code = cv2.Error.StsNoMem
    monkeypatch.setattr(score_module, "read_ids", greedy)
    monkeypatch.setattr(processes, "_context", lambda: multiprocessing.get_context("fork"))
    code, out, err = run("score", truth, truth, "--workers", workers)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert re.match(r"image \d+: out of memory \(use fewer --workers", err)


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert [useful_workers(images) for images in (0, 1, 12, 5000)] == [1, 1, 1, 4]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(256), raising=False)
    assert useful_workers(5000) == score_module.MOST


def test_called_wrongly(run: Run, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), (truth,), (truth, truth, "--workers", 0), (truth, truth, "--wrkers", 2)):
        assert run("score", *arguments)[0] == 2
    assert run("score", "--help")[0] == 0


def test_a_reader_who_has_enough_sees_no_traceback(truth: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "score", str(truth), str(truth)],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0, "the work is done"
    assert "Error" not in done.stderr


def test_a_bar_comes_when_work_is_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress("score", 9, "images", patience=1.0) as advance:
        advance()
        advance(2)
        assert not capsys.readouterr().err
        now = 2.0
        advance()
        advance()
        now = 4.0
        advance(note="a note")
    shown = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert shown == [
        "score [########            ] 4/9 images, 2.0/s, 0:00:02 left",
        "score [#############       ] 6/9 images, 1.5/s, 0:00:02 left, a note\n",
    ]


def test_a_table_aligns() -> None:
    text = table(("name", "n"), [("a", "10"), ("long name", "5")], left=1)
    assert text.splitlines() == ["name        n", "a          10", "long name   5"]
    assert table(("", ""), [("a", "b")], left=2) == "a  b"
    assert not table(("", ""), [], left=2)
