"""Rendering that is killed, stopped or out of space goes on to the same bytes, without remains."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from handmade import hashes

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.scenes.scene import write_dataset

IMAGES = 100
CONFIG = RenderConfig(samples_per_shard=1)
"""One image a shard makes many moments."""
MAIN = Path(__file__).parents[1] / "cli.py"

# Dies in the middle of the write that an outer hand has chosen, as a power cut would: before the
# bytes are whole, before they are synced, before they have their name, and before the folder is.
DIES_WRITING = """
import os, signal, sys
from pathlib import Path
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.base.files import Storage

root, out, moment, calls = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def dying(work):
    def wrapped(*arguments, **settings):
        global calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments, **settings)
    return wrapped

dataset = read_dataset(CocoLayout.of(root, "train"))
if moment == "fsync":
    os.fsync = dying(os.fsync)
else:
    setattr(Path, moment, dying(getattr(Path, moment)))
render(dataset, "train", Storage(out), RenderConfig(samples_per_shard=1), workers=0)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A dataset of many small images, and the hashes of its cache."""
    root = tmp_path_factory.mktemp("many")
    write_dataset(root / "coco", images=IMAGES, val_images=0, seed=1, size=32)
    dataset = read_dataset(CocoLayout.of(root / "coco", "train"))
    render(dataset, "train", Storage(str(root / "cache")), CONFIG, workers=0)
    return root / "coco", hashes(root / "cache")


def finish(root: Path, out: Path) -> None:
    render(
        read_dataset(CocoLayout.of(root, "train")), "train", Storage(str(out)), CONFIG, workers=0
    )


def tars(out: Path) -> int:
    return len(list(out.glob("*.tar")))


@contextmanager
def started(
    root: Path, out: Path, workers: int, limits: str = "true"
) -> Iterator[subprocess.Popen[str]]:
    """`panoptic preprocess` in a process group of its own, as a shell starts it."""
    command = [
        *("sh", "-c", f'{limits} && exec "$@"', "sh"),
        *(sys.executable, str(MAIN), "preprocess", "--coco", str(root), "--split", "train"),
        *("--out", str(out), "--workers", str(workers), "--samples-per-shard", "1"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_tars(process: subprocess.Popen[str], out: Path, count: int) -> list[psutil.Process]:
    """Waits for so many tars; the processes that the program has started."""
    while process.poll() is None and tars(out) < count:
        time.sleep(0.001)
    below: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return below


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, wanted = many
    out, rng = tmp_path / "cache", np.random.default_rng()
    step = IMAGES // 7
    for kill in range(6):
        workers = 2 if kill == 3 else 0
        with started(root, out, workers) as process:
            below = wait_for_tars(process, out, tars(out) + 1 + int(rng.integers(step)))
            time.sleep(float(rng.uniform(0, 0.01)))
            process.kill()
            assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"
        assert gone(below)
        assert not (out / "index.json").exists()
    finish(root, out)
    assert hashes(out) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
def test_a_kill_in_the_middle_of_a_write_changes_no_byte(
    many: tuple[Path, dict[str, str]], tmp_path: Path, moment: str
) -> None:
    root, wanted = many
    out = tmp_path / "cache"
    (tmp_path / "script.py").write_text(DIES_WRITING)
    for calls in np.random.default_rng().integers(1, 60, 2).tolist():
        command = [sys.executable, str(tmp_path / "script.py"), str(root), str(out), moment]
        environment = {**os.environ, "PYTHONPATH": str(MAIN.parent)}
        done = subprocess.run([*command, str(calls)], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
    finish(root, out)
    assert hashes(out) == wanted


@pytest.mark.slow
def test_workers_that_are_killed_are_replaced(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, wanted = many
    out, rng = tmp_path / "cache", np.random.default_rng()
    killed = 0
    with started(root, out, 2) as process:
        while killed < 4 and process.poll() is None:
            below = wait_for_tars(process, out, 2 + 15 * killed)
            workers = [child for child in below if is_worker(child)]
            if workers:
                rng.choice(np.array(workers, object)).kill()
                killed += 1
        assert process.wait(timeout=60) == 0
        assert killed == 4
        assert "Traceback" not in (process.stderr.read() if process.stderr else "")
    assert hashes(out) == wanted  # which finds orphans, too


def is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


class DeadlyStorage(Storage):
    """Kills the worker that writes the second shard, as often as it tries to."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or dies."""
        if name == "train-00001.tar":
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(name, data)

    def absolute(self) -> Storage:
        """The same, in its own type."""
        return self


@pytest.mark.slow
def test_a_task_that_kills_its_workers_ends_in_one_line(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, tmp_path: Path
) -> None:
    config = RenderConfig(samples_per_shard=4)
    with pytest.raises(InputError) as caught:
        render(tiny_dataset, "train", DeadlyStorage(str(tmp_path)), config, workers=1)
    assert caught.value.code == "worker-killed"
    assert re.fullmatch(r"shard train-00001: its worker died 4 times.*", str(caught.value))
    assert not list(tmp_path.glob(".*"))
    render(tiny_dataset, "train", Storage(str(tmp_path)), config, workers=0)
    assert hashes(tmp_path) == hashes(tiny_cache)


@pytest.mark.slow
def test_nobody_can_connect_to_our_workers(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    with started(many[0], tmp_path / "cache", 2) as process:
        below = wait_for_tars(process, tmp_path / "cache", 3)
        assert sum(is_worker(child) for child in below) == 2
        for each in (psutil.Process(process.pid), *below):
            assert not each.net_connections(kind="inet")


@pytest.mark.slow
def test_workers_that_cannot_start_end_in_one_line(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    with started(many[0], tmp_path / "cache", 2, "ulimit -n 12") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"no worker process can start: Too many open files .*\n", errors), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "group"),
    [(signal.SIGINT, 2, True), (signal.SIGTERM, 0, False)],
)
def test_a_signal_ends_in_one_line(
    many: tuple[Path, dict[str, str]],
    tmp_path: Path,
    number: signal.Signals,
    workers: int,
    group: bool,
) -> None:
    root, wanted = many
    out = tmp_path / "cache"
    with started(root, out, workers) as process:
        below = wait_for_tars(process, out, 5)
        (os.killpg if group else os.kill)(process.pid, number)  # Ctrl-C reaches the whole group
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number
    assert re.fullmatch(
        rf"stopped by {number.name}: \d+ of {IMAGES} shards are done,"
        r" run the same command to go on\n",
        errors,
    )
    assert gone(below)
    assert not list(out.glob(".*"))
    finish(root, out)
    assert hashes(out) == wanted


@pytest.mark.slow
def test_a_signal_while_workers_start_ends_in_one_line(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    with started(many[0], tmp_path / "cache", 2) as process:
        while not (tmp_path / "cache" / "plan.json").exists():
            time.sleep(0.001)
        time.sleep(float(np.random.default_rng().uniform(0, 0.4)))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
    assert errors.count("\n") == 1
    assert errors.startswith("stopped by SIGINT")


@pytest.fixture
def limited() -> Iterator[None]:
    """No file may grow beyond 20 kB: the kernel refuses the rest of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("limited")
def test_a_write_that_the_kernel_cuts_short_leaves_nothing(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, tmp_path: Path
) -> None:
    config = RenderConfig(samples_per_shard=4)
    with pytest.raises(InputError, match="cannot write: File too large") as caught:
        render(tiny_dataset, "train", Storage(str(tmp_path)), config, workers=0)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "inputs.jsonl"}
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    render(tiny_dataset, "train", Storage(str(tmp_path)), config, workers=0)
    assert hashes(tmp_path) == hashes(tiny_cache)


@pytest.mark.slow
def test_a_full_disk_of_a_worker_ends_in_one_line(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, wanted = many
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["-o", "size=200k"]
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", *size, "tmpfs", str(disk)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        out = disk / "cache"
        with started(root, out, 2) as process:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 1
        assert errors.count("\n") == 1
        assert os.strerror(errno.ENOSPC) in errors
        assert 0 < tars(out) < IMAGES
        assert not list(out.glob(".*"))
        remount = ["mount", "-o", "remount,size=20m", str(disk)]
        subprocess.run(remount, check=True)
        finish(root, out)
        assert hashes(out) == wanted
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_second_run_is_refused_in_one_line(
    many: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, wanted = many
    out = tmp_path / "cache"
    with started(root, out, 0) as first:
        wait_for_tars(first, out, 3)
        first.send_signal(signal.SIGSTOP)
        with started(root, out, 0) as second:
            _, errors = second.communicate(timeout=30)
            assert second.returncode == 1
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=30) == 0
    assert errors.count("\n") == 1
    assert "another run is writing here" in errors
    assert hashes(out) == wanted
