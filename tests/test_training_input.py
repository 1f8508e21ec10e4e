"""Bad input to a training: one line, exit code 1, and no run that is half begun."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Run
from safetensors.torch import save_file
from short_runs import ROOT, lines_of, make_config, same_run, saved_steps, write_config

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import encode_index
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import ShardReader, write_shard
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.train.loop import train as train_run
from panoptic_cache.train.stopping import StopRequest, guarded_run, rank_advice

Refuse = Callable[..., str]


pytestmark = pytest.mark.usefixtures("one_thread_without_gpu")


@pytest.fixture
def refuse(run: Run, tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Refuse:
    """Runs the command with settings; the one line that it ends with."""

    def call(*settings: str, resume: bool = False) -> str:
        file = write_config(make_config(tiny_cache, tmp_path / "run"), tmp_path / "run.toml")
        options = [part for setting in settings for part in ("--set", setting)]
        code, _, _ = run("train", file, *options, *(["--resume"] if resume else []))
        assert code == 1
        (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert "\n" not in line
        return line

    return call


@pytest.fixture(scope="module")
def whole(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing went wrong with. Read only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("run") / "whole"
    train_run(make_config(tiny_cache, out))
    torch.set_num_threads(threads)
    return out


# Settings and caches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.wight_decay=1"], r"unknown key wight_decay \(did you mean weight_decay\?\)"),
        (["data.size=30"], r"30 pixels are no multiple of the patch size 7 \(28 is\)"),
        (["optim.clip_norm=0"], r"optim\.clip_norm: Expected `float` > 0"),
        (["data.reader=stream", "data.workers=4"], "3 shards for 4 readers: 1 ranks with 4"),
        (["data.cache=nowhere"], "no index: no cache, or one that is not finished"),
        (["trackers=['tensorbord']"], "no such tracker: tensorbord"),
    ],
)
def test_a_setting_that_does_not_work(
    refuse: Refuse, tmp_path: Path, settings: list[str], message: str
) -> None:
    line = refuse(*settings)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_format(refuse: Refuse, cache: Path) -> None:
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps({**index, "format_version": 99}))
    line = refuse(f"data.cache={cache}")
    assert "cache format 99, this program reads 1 (render it again)" in line


def test_a_cache_of_another_size(
    refuse: Refuse, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    render(tiny_dataset, "train", Storage(str(cache)), RenderConfig("squash", 28), workers=0)
    assert "rendered at 28 px, trained at 56 px" in refuse(f"data.cache={cache}", "data.size=56")


def test_a_cache_without_samples(refuse: Refuse, tiny_root: Path, tmp_path: Path) -> None:
    nothing = read_dataset(CocoLayout.of(tiny_root, "val")).spread(0)
    render(nothing, "val", Storage(str(tmp_path / "cache")), RenderConfig(), workers=0)
    assert "the cache is empty" in refuse(f"data.cache={tmp_path / 'cache'}")


def rewrite(cache: Path, change: Callable[[Sample], Sample], **index: Any) -> None:
    """Changes every sample of a cache, and fields of its index, whose sums are right again."""
    storage, reader = Storage(str(cache)), ShardReader(cache)
    samples = iter([change(reader.sample(position)) for position in range(len(reader))])
    shards = []
    for shard in reader.index.shards:
        part = islice(samples, shard.samples)
        plan = reader.index.fingerprint
        written = write_shard(storage, shard.name, part, plan=plan, rejections=(), repairs={})
        shards.append(written.entry())
    found = msgspec.structs.replace(reader.index, shards=tuple(shards), **index)
    storage.write("index.json", encode_index(found))


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_labels_that_the_cache_does_not_have(refuse: Refuse, cache: Path, reader: str) -> None:
    def relabel(sample: Sample) -> Sample:
        return replace(sample, segments=tuple(replace(s, label=5000) for s in sample.segments))

    rewrite(cache, relabel)
    line = refuse(f"data.cache={cache}", f"data.reader={reader}")
    assert re.search(r"\d{12}: a segment has no label of the cache", line)


def test_an_index_with_other_counts(refuse: Refuse, cache: Path) -> None:
    rewrite(cache, lambda sample: sample, samples=99)
    line = refuse(f"data.cache={cache}")
    assert "the index counts 99 samples, its shards have 12" in line


def test_no_categories(refuse: Refuse, cache: Path) -> None:
    rewrite(cache, lambda sample: sample, categories=())
    assert "index damaged: its categories are not labelled" in refuse(f"data.cache={cache}")


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_images_without_segments_train(cache: Path, tmp_path: Path, reader: Any) -> None:
    def empty(sample: Sample) -> Sample:
        return replace(sample, segments=(), segment_map=np.zeros_like(sample.segment_map))

    rewrite(cache, empty)
    config = make_config(cache, tmp_path / "run", steps=3)
    train_run(replace(config, data=replace(config.data, reader=reader)))
    assert all(math.isfinite(line["loss"]) for line in lines_of(tmp_path / "run"))


def test_a_checkpoint_of_another_model(refuse: Refuse, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    line = refuse("model.channels=8", resume=True)
    assert "the checkpoint is of another configuration: model.channels was 16, now 8" in line


def test_a_run_of_which_only_checkpoints_are_left(
    refuse: Refuse, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "run/checkpoints")
    assert "a run lies here already (add --resume" in refuse()
    assert saved_steps(tmp_path / "run") == [6, 7]


@pytest.mark.slow
def test_the_line_is_all_that_standard_error_shows(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path / "run")
    config = replace(config, data=replace(config.data, size=30))
    file = write_config(config, tmp_path / "run.toml")
    # What is not given, the launcher says that it has chosen.
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    options += ["--mixed_precision", "no", "--num_cpu_threads_per_process", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options),
            *("-m", "panoptic_cache.train", str(file)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == "data.size: 30 pixels are no multiple of the patch size 7 (28 is)"


# Damage that shows while it trains


def damage(cache: Path, what: str) -> None:
    for tar in cache.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        if what == "header":
            data[:512] = bytes(512)  # reads as the end of the tar
        elif what == "bytes":
            data[512:-1024] = os.urandom(len(data) - 1536)
        tar.write_bytes(data)
        if what == "gone":
            tar.unlink()


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards(refuse: Refuse, cache: Path, workers: int) -> None:
    damage(cache, "bytes")
    line = refuse(f"data.cache={cache}", f"data.workers={workers}")
    assert line.startswith("train-0000")
    assert ".tar: 0000000000" in line
    assert "panoptic verify" in line


@pytest.mark.parametrize("what", ["bytes", "header", "gone"])
def test_damaged_shards_in_sequence(refuse: Refuse, cache: Path, what: str) -> None:
    damage(cache, what)
    line = refuse(f"data.cache={cache}", "data.reader=stream")
    assert f"{cache}/train-0000" in line
    assert ("cannot read the shard" if what == "gone" else "its SHA-256 is not") in line


def test_a_shard_that_cannot_be_read(
    refuse: Refuse, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("panoptic_cache.pipeline.cache.shards.ShardReader.members", broken)
    line = refuse(f"data.cache={cache}")
    assert line.startswith("train-0000")
    assert "cannot be read: Input/output error" in line


# The launcher and the surroundings


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed, which training does not use"),
        ("ACCELERATE_USE_FSDP", "1", "asks for FSDP, which training does not use"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "the launcher asks for fp16, the configuration for"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", r"for bf16, .* fp32 \(launch with .*precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"torch\.compile.* --set compile=true"),
    ],
)
def test_what_the_launcher_asks_for_in_vain(
    refuse: Refuse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert re.search(message, refuse())
    assert not (tmp_path / "run").exists()


def test_variables_of_a_launcher_change_no_gradient(
    whole: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    train_run(make_config(tiny_cache, tmp_path))
    assert same_run(whole, tmp_path)


def test_a_tracker_that_does_not_start_leaves_no_run(
    refuse: Refuse, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_key(*_: object, **__: object) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.Accelerator.init_trackers", no_key)
        line = refuse("trackers=['tensorboard']")
    assert line.startswith("trackers: a tracker cannot start: No API key configured. Use")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_run(make_config(tiny_cache, tmp_path / "run", steps=1))  # without --resume


def test_a_compiler_that_is_not_there(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    class CompileError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def compiled(*_: object) -> None:
        raise CompileError("No working C++ compiler found\nin torch._inductor.config")

    monkeypatch.setattr("panoptic_cache.train.loop.jitter_colour", compiled)
    line = refuse()
    assert line.startswith("compile: torch.compile fails: No working C++ compiler found in torch")
    assert line.endswith("or --set compile=false)")


def test_an_error_of_a_trackers_thread_is_no_traceback(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    before = threading.excepthook
    with guarded_run(make_config(tiny_cache, tmp_path / "run")):
        thread = threading.Thread(target=full)
        thread.start()
        thread.join()
    assert threading.excepthook is before
    assert capsys.readouterr().err == ""


def test_resuming_where_no_run_lies_says_so(
    tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_run(make_config(tiny_cache, tmp_path / "mistyped", steps=1), resume=True)
    assert f"no checkpoint in {tmp_path / 'mistyped'}, starting at step 0" in caplog.text


def test_a_finished_run_that_goes_on_says_that_its_rate_jumps(
    whole: Path, tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    train_run(make_config(tiny_cache, run, steps=30), resume=True)
    rates = [line["lr"] for line in lines_of(run)]
    wanted = f"the learning rate jumps from {rates[6]:.2g} to {rates[7]:.2g}: the run was to end at"
    assert f"{wanted} step 7, now at 30" in caplog.text
    caplog.clear()
    train_run(make_config(tiny_cache, run, steps=30), resume=True)
    assert "jumps" not in caplog.text


# Memory and disk


def test_memory_that_does_not_suffice(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr("panoptic_cache.train.loop.jitter_colour", greedy)
    line = refuse()
    assert line.startswith("out of memory: ")
    assert "lower data.micro_batch, now 2; the batch stays 4" in line


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_keeps_the_checkpoint_before(
    refuse: Refuse,
    whole: Path,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    """A limit on the size of files stands for the disk: writes fail within a file."""
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    room = (newest / file).stat().st_size - 1000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(weights: Any, path: Path) -> None:
        if path.parent.name == ".tmp-step_0000004":
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        save_file(weights, path)

    monkeypatch.setattr("panoptic_cache.train.checkpoint.save_file", fill)
    try:
        line = refuse()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = tmp_path / "run"
    assert line.startswith(f"{run}/checkpoints: cannot write the checkpoint: ")
    assert "step_0000002 is the last complete one" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000002"]
    monkeypatch.undo()
    train_run(make_config(tiny_cache, run), resume=True)
    assert same_run(whole, run)


def test_other_files_that_cannot_be_written(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("panoptic_cache.train.runlog.RunLog.step", full)
    assert refuse() == f"{tmp_path / 'run'}: No space left on device"


def test_a_rank_that_has_gone() -> None:
    error = RuntimeError("[third_party/gloo/pair.cc:553] Connection closed by peer")
    with pytest.raises(InputError, match="another rank has gone"), rank_advice():
        raise error
    request = StopRequest()
    request(15, None)
    with pytest.raises(SystemExit) as caught, rank_advice(request):
        raise error  # its launcher is ending it
    assert caught.value.code == 143
    with pytest.raises(RuntimeError, match="another"), rank_advice():
        raise RuntimeError("another")


# Checkpoints that are not whole


def test_a_damaged_checkpoint_is_ignored_with_a_line(
    whole: Path, tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`test_checkpoint` has the other files and damages."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damaged = run / "checkpoints/step_0000007/optimizer.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    train_run(make_config(tiny_cache, run), resume=True)
    (line,) = [r.getMessage() for r in caplog.records if "is ignored" in r.getMessage()]
    assert line.startswith(f"{damaged.parent} is ignored: optimizer.pt ")
    assert same_run(whole, run)
    assert saved_steps(run) == [6, 7]
