"""The loop: what a run leaves behind, exact resuming after a kill, ranks, and what it refuses."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from short_runs import (
    PROCESSES,
    STEPS,
    TIMES,
    finish,
    lines_of,
    make_config,
    same_run,
    saved_steps,
    start_ranks,
    untimed,
    weights_of,
    write_config,
)

from panoptic_cache.pipeline.base.config import load_config
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoPanoptic
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.train.checkpoint import incomplete, latest_checkpoint, read_state
from panoptic_cache.train.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    TaskRatio,
    TrainConfig,
)
from panoptic_cache.train.loop import task_of
from panoptic_cache.train.loop import train as train_run
from panoptic_cache.train.losses import instance_loss, semantic_loss
from panoptic_cache.train.optim import learning_rate
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.restore import load_model
from panoptic_cache.train.stopping import memory_advice, not_finite, smaller_steps

SAMPLES = 12
FIELDS = {"step", "epoch", "task", "loss", "pixel", "tv", "dice", "norm", "lr", *TIMES}


@pytest.fixture(scope="module", autouse=True)
def one_thread_without_gpu() -> Iterator[None]:
    """The same arithmetic in this process and its children, bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def whole(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing interrupted. Read only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("run") / "whole"
    train_run(make_config(tiny_cache, out))
    return out


# What a run leaves behind


def test_a_line_for_each_step(whole: Path, tiny_cache: Path) -> None:
    config = make_config(tiny_cache, whole)
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for step, line in enumerate(lines):
        assert set(line) == FIELDS
        assert line["task"] == task_of(config.seed, step, config.tasks)
        assert line["epoch"] == pytest.approx(4 * (step + 1) / SAMPLES)
        assert line["lr"] == learning_rate(config.optim, step, STEPS, 3)
        assert line["loss"] == pytest.approx(
            line["pixel"] + 0.1 * line["tv"] + line["dice"], rel=1e-5
        )
        assert (line["dice"] > 0) == (line["task"] == "instance")
        assert line["images_per_second"] > 0
        assert 0 <= line["waited"] <= 1


def test_the_configuration_reads_back(whole: Path, tiny_cache: Path) -> None:
    assert load_config(TrainConfig, whole / "config.toml") == make_config(tiny_cache, whole)


def test_the_newest_checkpoints_stay_and_load(whole: Path, tiny_cache: Path) -> None:
    folders = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert folders == ["step_0000006", "step_0000007"]
    assert all(incomplete(whole / "checkpoints" / name) is None for name in folders)
    model, state = load_model(whole)
    assert state.step == STEPS
    assert state.config == make_config(tiny_cache, whole)
    assert model(torch.zeros(1, 3, 28, 28)).semantic.shape[1] == len(state.categories)


def test_lines_can_be_fewer(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path / "run", log_every=4, checkpoint_every=100)
    assert train_run(config).name == "step_0000007"
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [4, 7]


def test_mixed_precision_trains(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path, steps=2, precision="bf16")
    train_run(config)
    assert all(math.isfinite(line["loss"]) for line in lines_of(tmp_path))
    assert {value.dtype for value in weights_of(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("encoding", ["direct", "classification"])
def test_other_encodings_train(tiny_cache: Path, tmp_path: Path, encoding: Any) -> None:
    train_run(make_config(tiny_cache, tmp_path, steps=3, loss=LossConfig(encoding=encoding)))
    lines = lines_of(tmp_path)
    assert all(math.isfinite(line["loss"]) and line["dice"] == 0 for line in lines)


@pytest.mark.slow
def test_it_learns(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path, steps=90, checkpoint_every=100)
    data = replace(config.data, augment=False)
    model = replace(config.model, drop_path=0.0)
    loss = LossConfig(instance="squared")
    optim = OptimConfig(lr=3e-3, warmup_epochs=1.0, layer_decay=1.0)
    train_run(replace(config, data=data, model=model, loss=loss, optim=optim))
    for task in ("instance", "semantic"):
        losses = [line["pixel"] for line in lines_of(tmp_path) if line["task"] == task]
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


# Stop and go on


def test_a_finished_run_has_nothing_left_to_do(
    whole: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    folder = train_run(make_config(tiny_cache, whole), resume=True)
    assert folder.name == "step_0000007"
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    assert len(lines_of(whole)) == STEPS


def test_resuming_without_a_checkpoint_starts(
    whole: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n{"step": 2, "lo')
    train_run(make_config(tiny_cache, tmp_path), resume=True)
    assert same_run(whole, tmp_path)


def die_at(config: TrainConfig, module: str, name: str, call: int) -> None:
    """Trains until a function is called for the `call`-th time; then this process is killed."""
    torch.set_num_threads(1)
    count = 0
    owner = sys.modules[module]
    original = getattr(owner, name)

    def deadly(*arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **settings)

    setattr(owner, name, deadly)
    train_run(config, resume=True)


def kill_in(config: TrainConfig, module: str, name: str, call: int) -> list[int]:
    """Runs `die_at` in a process of its own; the steps that it has saved."""
    child = PROCESSES.Process(target=die_at, args=(config, module, name, call))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    return saved_steps(Path(config.out))


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(
    whole: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """`test_checkpoint` has all moments of saving, `test_two_ranks` random ones."""
    config = make_config(tiny_cache, tmp_path)
    assert kill_in(config, "panoptic_cache.train.checkpoint", "sync_folder", 3) == [2]
    train_run(config, resume=True)
    assert same_run(whole, tmp_path)
    assert saved_steps(tmp_path) == [6, 7]


# What is refused


def test_a_run_is_not_overwritten(whole: Path, tiny_cache: Path) -> None:
    before = untimed(whole)
    with pytest.raises(InputError, match=r"whole: a run lies here already \(add --resume"):
        train_run(make_config(tiny_cache, whole))
    assert untimed(whole) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.channels=8", "model.channels was 16, now 8"),
        ("model.taps=[1, 2]", r"model.taps was \(1, 2, 3\), now \(1, 2\)"),
        ("loss.d=3", "loss.d was 20.0, now 3.0"),
        ('loss.instance="norm"', "loss.instance was squared_then_norm, now norm"),
        ("seed=2", "seed was 1, now 2"),
        ("data.size=35", "data.size was 28, now 35"),
        ("data.batch=8", "data.batch was 4, now 8"),
        ("data.flip=false", "data.flip was True, now False"),
        ("optim.weight_decay=0.1", "optim.weight_decay was 0.05, now 0.1"),
        ("ema=0.99", "ema was None, now 0.99"),
    ],
)
def test_another_configuration_does_not_resume(whole: Path, setting: str, message: str) -> None:
    config = load_config(TrainConfig, whole / "config.toml", [setting])
    with pytest.raises(InputError, match=f"whole: .* of another configuration: {message}"):
        train_run(config, resume=True)
    assert load_config(TrainConfig, whole / "config.toml") == replace(config, **vars_of(whole))


def vars_of(run: Path) -> dict[str, Any]:
    """The fields of the run's configuration, as its newest checkpoint knows it."""
    folder = latest_checkpoint(run / "checkpoints")
    assert folder is not None
    config = read_state(folder).config
    return {name: getattr(config, name) for name in TrainConfig.__slots__}


def test_what_does_not_change_the_run_may_change(
    whole: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_cache, tmp_path)
    assert kill_in(config, "panoptic_cache.train.loop", "set_learning_rate", 6) == [2, 4]
    data = replace(config.data, workers=1)
    train_run(replace(config, data=data, keep=1, checkpoint_every=3), resume=True)
    assert same_run(whole, tmp_path)
    assert saved_steps(tmp_path) == [7]


def test_another_cache_does_not_resume(
    whole: Path, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    render(tiny_dataset, "train", Storage(str(tmp_path)), RenderConfig("squash", 56), workers=0)
    config = load_config(TrainConfig, whole / "config.toml", [f"data.cache={tmp_path}"])
    with pytest.raises(InputError, match="the cache is not the one this run began with"):
        train_run(config, resume=True)


def test_a_size_that_patches_do_not_tile_leaves_no_folder(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path / "run")
    with pytest.raises(InputError, match=r"30 pixels .* \(28 is\)"):
        train_run(replace(config, data=replace(config.data, size=30)))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_a_line(
    run: Run, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panoptic_cache.train.loop.learning_rate", lambda *_: 1e30)
    file = write_config(
        make_config(tiny_cache, tmp_path / "run", log_every=100), tmp_path / "run.toml"
    )
    code, _, message = run("train", file, "--set", "checkpoint_every=3")
    assert code == 1
    assert "the loss is nan at step 1" in message  # the first after weights of 1e30
    assert message.startswith("batch of 0")
    assert message.endswith("(lower optim.lr, or use fp32)")
    assert "\n" not in message
    assert latest_checkpoint(tmp_path / "run/checkpoints") is None


# Tasks and ranks


@given(st.integers(0, 2**31), st.integers(0, 10_000))
def test_each_block_of_three_has_two_instance_steps_and_a_semantic_one(
    seed: int, block: int
) -> None:
    tasks = [task_of(seed, 3 * block + place, TaskRatio()) for place in range(3)]
    assert Counter(tasks) == {"instance": 2, "semantic": 1}
    assert tasks == [task_of(seed, 3 * block + place, TaskRatio()) for place in range(3)]


def test_tasks_are_shuffled() -> None:
    places = Counter(
        step % 3 for step in range(3000) if task_of(0, step, TaskRatio()) == "semantic"
    )  # fmt: skip
    assert min(places.values()) > 250
    assert sum(places.values()) == 1000


def test_the_distance_changes_at_its_switch() -> None:
    config = LossConfig(instance="squared_then_norm", switch=0.25)
    assert [config.distance_at(part) for part in (0.0, 0.24, 0.25, 1.0)] == [
        *("squared", "squared", "norm", "norm")
    ]
    assert LossConfig().distance_at(0.0) == "norm"
    assert LossConfig(instance="squared").distance_at(1.0) == "squared"


@pytest.mark.slow
def test_two_ranks_train_as_one_that_accumulates(tiny_cache: Path, tmp_path: Path) -> None:
    """And one rank goes on from what two have saved."""
    config = make_config(tiny_cache, tmp_path / "one", steps=4)
    config = replace(config, model=replace(config.model, drop_path=0.0))
    train_run(config)
    two = replace(config, out=str(tmp_path / "two"))
    assert finish(start_ranks(2, train_run, two)) == [0, 0]
    ones, twos = untimed(tmp_path / "one"), untimed(tmp_path / "two")
    assert [line["step"] for line in twos] == [1, 2, 3, 4]
    for one, other in zip(ones, twos, strict=True):
        assert one.pop("task") == other.pop("task")
        assert one == pytest.approx(other, rel=1e-3)
    last = latest_checkpoint(tmp_path / "two/checkpoints")
    assert last is not None
    assert {path.name for path in last.glob("rng_*")} == {"rng_0.pt", "rng_1.pt"}
    assert_close(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))
    assert train_run(replace(two, steps=5), resume=True).name == "step_0000005"


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        if not name.endswith("attn.k.bias"):  # no gradient but noise, which Adam scales up
            torch.testing.assert_close(value, other[name], atol=2e-5, rtol=1e-3)


def test_micro_batches_of_unequal_size_train_as_one(tiny_cache: Path, tmp_path: Path) -> None:
    runs = []
    for micro in (5, 3, 2):  # 5, 3 + 2, 2 + 2 + 1
        config = make_config(tiny_cache, tmp_path / str(micro), steps=4)
        data = replace(config.data, batch=5, micro_batch=micro)
        train_run(replace(config, data=data, model=replace(config.model, drop_path=0.0)))
        runs.append(tmp_path / str(micro))
    for run in runs[1:]:
        for one, other in zip(untimed(runs[0]), untimed(run), strict=True):
            assert one.pop("task") == other.pop("task")
            assert one == pytest.approx(other, rel=1e-3)
        assert_close(weights_of(runs[0]), weights_of(run))


# Asked to stop


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_the_first_step_there_is_nothing_to_finish(
    run: Run,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    file = write_config(make_config(tiny_cache, tmp_path / "run"), tmp_path / "run.toml")

    def opened(_: DataConfig) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("panoptic_cache.train.loop.open_caches", opened)
    assert run("train", file)[0] == code
    assert not (tmp_path / "run").exists()


# The average of the weights


def test_the_average_is_what_its_formula_says(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path, ema=0.5, steps=3, checkpoint_every=1, keep=9)
    train_run(config)
    folders = [tmp_path / f"checkpoints/step_{step:07d}" for step in (1, 2, 3)]
    name = "decoder.layers.0.weight"
    current = [load_file(folder / "model.safetensors")[name] for folder in folders]
    average = [load_file(folder / "ema.safetensors")[name] for folder in folders]
    for step in (1, 2):
        decay = min(0.5, (step + 1) / (step + 10))
        wanted = decay * average[step - 1] + (1 - decay) * current[step]
        torch.testing.assert_close(average[step], wanted)
    assert not torch.equal(average[2], current[2])


# What stops a run


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = semantic_loss, instance_loss

    def poisoned(number: int) -> Any:
        def loss(prediction: Any, *arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 8:  # the second micro-batch of step 3
                prediction.register_hook(lambda gradient: gradient * math.inf)
            return original[number](prediction, *arguments, **settings)

        return loss

    monkeypatch.setattr("panoptic_cache.train.loop.semantic_loss", poisoned(0))
    monkeypatch.setattr("panoptic_cache.train.loop.instance_loss", poisoned(1))
    config = make_config(tiny_cache, tmp_path, checkpoint_every=1, keep=9)
    with pytest.raises(InputError, match="the gradient's norm is nan at step 3") as caught:
        train_run(config)
    assert len(caught.value.where.split(", ")) == 4  # all samples of the step
    assert saved_steps(tmp_path) == [1, 2, 3]
    assert all(value.isfinite().all() for value in weights_of(tmp_path).values())


def test_only_samples_of_the_guilty_micro_batch_are_named() -> None:
    error = not_finite(Ranks(), 7, [0.5, math.nan], [("a", "b"), ("c", "d")], math.nan)
    assert str(error).startswith("batch of c, d: the loss is nan at step 7")
    many = [tuple(f"{n}" for n in range(40))]
    assert "31 and 8 more: " in str(not_finite(Ranks(), 7, [math.inf], many, 1.0))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(error: Exception) -> None:
    with pytest.raises(InputError) as caught, memory_advice(smaller_steps(TrainConfig())):
        raise error
    line = str(caught.value)
    assert line.startswith("out of memory: ")
    assert "\n" not in line
    for name in ("data.micro_batch, now 16", "gradient_checkpointing", "data.size, now 420"):
        assert name in line
    with pytest.raises(RuntimeError, match="another"), memory_advice(smaller_steps(TrainConfig())):
        raise RuntimeError("another")
