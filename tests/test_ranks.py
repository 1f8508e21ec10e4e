"""What ranks agree on, between two real processes."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import Interrupted, interruptible, started
from panoptic_cache.train.loader import prepare_worker
from panoptic_cache.train.ranks import Ranks, Verdict
from panoptic_cache.train.stopping import not_finite, stop_request

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["panoptic_cache.train.loop"])


def said(call: Any) -> str:
    """The message of an InputError, or the result as text."""
    try:
        return repr(call())
    except InputError as error:
        return str(error)


def fail_on_rank_1(rank: int) -> int:
    if rank == 1:
        raise InputError("a photo is damaged")
    return rank


def two_ranks(rank: int, store: str, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    found = [
        said(lambda: ranks.check_same({"the cache": "a"})),
        said(lambda: ranks.check_same({"the cache": "a", "first": rank})),
        said(lambda: ranks.agree(3, 1, signal=0, finite=True)),
        said(lambda: ranks.agree(3, 0, signal=15 * rank, finite=rank == 1)),
        said(lambda: ranks.agree(3, rank, signal=0, finite=True)),
        said(lambda: ranks.agree(3 + rank, 0, signal=0, finite=True)),
        str(
            not_finite(
                ranks, 3, [1.0, math.nan if rank else 1.0], [(f"{rank}a",), (f"{rank}b",)], 0
            )
        ),
        said(lambda: ranks.gather(lambda: fail_on_rank_1(rank))),
        said(lambda: ranks.gather(lambda: rank)),
    ]
    answers.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hear_the_same(tmp_path: Path) -> None:
    answers = PROCESSES.Queue()
    children = [
        PROCESSES.Process(target=two_ranks, args=(rank, str(tmp_path / "store"), answers))
        for rank in (0, 1)
    ]
    for child in children:
        child.start()
    found = dict(answers.get(timeout=60) for _ in children)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert found[0] == found[1]
    remedy = "start every rank with the same command"
    assert found[0] == [
        "None",
        "first: ranks differ: 0 on rank 0, 1 on rank 1"
        " (start every rank with the same command on a shared folder)",
        repr(Verdict(0, True)),
        repr(Verdict(15, False)),
        f"step 3: ranks disagree: steps 3 to 3, tasks 0 to 1 ({remedy})",
        f"step 3: ranks disagree: steps 3 to 4, tasks 0 to 0 ({remedy})",
        "batch of 1b: the loss is nan at step 3 (lower optim.lr, or use fp32)",
        "a photo is damaged",
        "[0, 1]",
    ]


@pytest.mark.slow
def test_a_folder_that_a_rank_does_not_see_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, file = Ranks(), tmp_path / "run" / "config.toml"
    monkeypatch.setattr("panoptic_cache.train.ranks.PATIENCE", 0.0)
    monkeypatch.setattr(ranks, "first", lambda _: b"what rank 0 has written")
    with pytest.raises(InputError, match=r"rank 0 does not see config\.toml"):
        ranks.check_shared(file)
    file.parent.mkdir()
    file.write_text("of an earlier run on this machine's own disk")
    with pytest.raises(InputError, match=r"rank 0 does not see config\.toml"):
        ranks.check_shared(file)
    monkeypatch.setattr("panoptic_cache.train.ranks.PATIENCE", 60.0)
    late = threading.Timer(0.5, file.write_bytes, [b"what rank 0 has written"])
    late.start()
    ranks.check_shared(file)
    late.join()


def test_one_rank_agrees_with_itself() -> None:
    ranks = Ranks()
    ranks.check_same({"x": 1})
    assert ranks.agree(1, 0, signal=2, finite=False) == Verdict(2, False)


# Signals


def test_the_first_signal_counts_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_request() as request:
        assert request.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_threads_do_not_spin_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with started():
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with started():
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_signal_during_an_import_is_not_swallowed_by_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "catches_all.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.01)\n"
        "except BaseException:\n"
        "    pass\n"
        "else:\n"
        "    whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    whole = []

    def start() -> None:
        whole.append(importlib.import_module("catches_all").whole)
        time.sleep(5)

    with pytest.raises(Interrupted), interruptible():
        start()
    assert whole == [True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("typer", "from panoptic_cache.cli import main; main()"),
        ("typer", "from panoptic_cache.train.__main__ import main; main()"),
        ("torch", "from panoptic_cache.cli import main; main()"),
    ],
)
def test_a_signal_while_it_starts_ends_it_at_once(
    tmp_path: Path, number: signal.Signals, module: str, command: str
) -> None:
    """A module that takes long to import stands for all of them."""
    (tmp_path / f"{module}.py").write_text(
        "import os, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {number.value})\n"
        "    time.sleep(20)\n"
        "except BaseException:\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "train", "run.toml"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"stopped by {number.name}\n"


def stubborn(ready: Any, done: Any) -> None:
    prepare_worker(0)
    ready.set()
    done.wait(20)


def test_a_loader_process_is_not_ended_by_signals() -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=stubborn, args=(ready, done))
    child.start()
    assert ready.wait(20)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child.pid or 0, number)
    done.set()
    child.join(20)
    assert child.exitcode == 0
