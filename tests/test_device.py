"""Devices that are not here: fp16 with a scaler, on the processor; Apple's MPS, pretended."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from short_runs import finish, lines_of, make_config, same_run, saved_steps, start_ranks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.class_losses import PixelTerms, class_losses
from panoptic_cache.train.config import TrainConfig, ValidationConfig
from panoptic_cache.train.data import Batch
from panoptic_cache.train.device import device_kind, fit_precision
from panoptic_cache.train.loop import train
from panoptic_cache.train.stopping import memory_advice

pytestmark = pytest.mark.usefixtures("one_thread_without_gpu")


def run_anew(config: TrainConfig, *, resume: bool = False) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(config, resume=resume)


# fp16


class HalfOnProcessor(Accelerator):  # type: ignore[misc]
    """Autocast to float16 and torch's scaler, which Accelerate itself allows on GPUs only."""

    def __init__(self, *, mixed_precision: str, **settings: Any) -> None:
        super().__init__(mixed_precision="no", **{**settings, "cpu": True})
        if mixed_precision == "fp16":
            self.state._mixed_precision = "fp16"
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", growth_interval=3)


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("panoptic_cache.train.device.Accelerator", HalfOnProcessor)
    monkeypatch.setattr("panoptic_cache.train.device.device_kind", lambda: "cuda")


@pytest.mark.usefixtures("half")
def test_fp16_trains_with_a_scale_and_resumes_bit_for_bit(tiny_cache: Path, tmp_path: Path) -> None:
    config = make_config(tiny_cache, tmp_path / "whole", precision="fp16", keep=9)
    run_anew(config)
    lines = lines_of(tmp_path / "whole")
    assert [line["scale"] for line in lines] == [65536.0] * 2 + [131072.0] * 3 + [262144.0] * 2
    assert [line["skipped"] for line in lines] == [0] * 7
    run_anew(replace(config, out=str(tmp_path / "single"), precision="fp32"))
    for line, single in zip(lines, lines_of(tmp_path / "single"), strict=True):
        assert line["loss"] == pytest.approx(single["loss"], rel=1e-2)
        assert line["norm"] == pytest.approx(single["norm"], rel=5e-2)
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"rest/checkpoints/step_{step:07d}")
    run_anew(replace(config, out=str(tmp_path / "rest")), resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "rest")


def overflow(monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float) -> None:
    """Makes the gradients of the micro-batches with these numbers `factor` times as large."""
    import panoptic_cache.train.loop as loop  # noqa: PLC0415

    count = 0

    def wrapped(original: Any) -> Any:
        def loss(prediction: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            if count in calls:
                prediction.register_hook(lambda gradient: gradient * factor)
            return original(prediction, *arguments, **settings)

        return loss

    for name in ("semantic_loss", "instance_loss"):
        monkeypatch.setattr(loop, name, wrapped(getattr(loop, name)))


def train_in_half(config: TrainConfig) -> None:
    """As a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panoptic_cache.train.device.Accelerator", HalfOnProcessor)
        patch.setattr("panoptic_cache.train.device.device_kind", lambda: "cuda")
        train(config)


@pytest.mark.slow
def test_ranks_in_fp16_go_on_where_a_frozen_part_thaws(tiny_cache: Path, tmp_path: Path) -> None:
    """Norms are those of gradients without the scale, before and after the thaw at step 3."""
    config = make_config(tiny_cache, tmp_path / "one", steps=6)
    model = replace(config.model, drop_path=0.0, freeze="decoder", freeze_epochs=1.0)
    config = replace(config, model=model)
    run_anew(config)
    half = replace(config, out=str(tmp_path / "two"), precision="fp16")
    assert finish(start_ranks(2, train_in_half, half)) == [0, 0]
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert two["norm"] == pytest.approx(one["norm"], rel=5e-2)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)


@pytest.mark.usefixtures("half")
def test_a_step_that_overflows_is_left_out_and_counted(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, {4, 5}, math.inf)  # of steps 1 and 2
    config = make_config(tiny_cache, tmp_path, precision="fp16", checkpoint_every=1, keep=9)
    run_anew(config)
    lines = lines_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 0, 0, 0, 0]
    assert [line["scale"] for line in lines][:4] == [65536.0, 32768.0, 16384.0, 16384.0]
    assert ["norm" in line for line in lines][:4] == [True, False, False, True]
    assert all(math.isfinite(line["loss"]) for line in lines)
    folders = [tmp_path / f"checkpoints/step_{step:07d}" for step in (1, 2, 3, 4)]
    one, two, three, four = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == two == three != four


@pytest.mark.usefixtures("half")
def test_a_gradient_that_no_scale_can_mend_ends_the_run(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, {*range(5, 99)}, math.inf)
    config = make_config(tiny_cache, tmp_path, precision="fp16", steps=30, log_every=30)
    line = r"the gradient's norm is (nan|inf) at step 18, the losses are finite .* use fp32"
    with pytest.raises(InputError, match=line):
        run_anew(config)


@pytest.mark.usefixtures("half")
def test_a_loss_that_is_not_finite_is_no_skipped_step(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panoptic_cache.train.loop.learning_rate", lambda *_: 1e30)
    with pytest.raises(InputError, match="the loss is nan at step 1"):
        run_anew(make_config(tiny_cache, tmp_path, precision="fp16"))


def test_small_gradients_of_classes_survive_half_precision() -> None:
    """A pixel of a large image has a gradient that only the scaler's factor lifts into fp16."""
    size, scale = 512, 65536.0
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, size, size, generator=random).half().requires_grad_()
    target = torch.randint(0, 3, (1, size, size), generator=random)
    weight = torch.full((1, size, size), 1e-3 / size**2)
    none = torch.zeros(1, size - 1, size)
    terms = PixelTerms(target, weight, none, none.mT)
    total, _, _ = class_losses(logits, terms)
    (found,) = torch.autograd.grad(total * scale, logits)
    wanted = logits.detach().float().softmax(1) - torch.nn.functional.one_hot(target, 3).movedim(
        -1, 1
    )
    assert found.dtype == torch.float16
    torch.testing.assert_close(
        found.float() / scale, wanted * 1e-3 / size**2, rtol=2e-2, atol=1e-12
    )


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match=r"precision: fp16 needs a CUDA device, this is cpu"):
        fit_precision(TrainConfig(precision="fp16"))


# MPS


class PretendedMps(TorchFunctionMode):
    """What is asked of MPS is done by the processor."""

    asked = 0

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        def here(value: Any) -> Any:
            if isinstance(value, torch.device) and value.type == "mps":
                self.asked += 1
                return torch.device("cpu")
            return value

        changed = {name: here(value) for name, value in (settings or {}).items()}
        return function(*map(here, arguments), **changed)


class WithoutDouble(TorchDispatchMode):
    """As on MPS, no tensor of float64 can be made, but the nine sums of a validation elsewhere."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        result = function(*arguments, **(settings or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            if result.shape == (9,):
                return result
            raise TypeError("the MPS framework doesn't support float64")
        return result


def test_a_run_on_mps_is_one_in_fp32_without_what_mps_lacks(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    looks = ValidationConfig(cache=str(tiny_cache), every=3, samples=3)
    config = make_config(tiny_cache, tmp_path / "here", validation=looks, pictures_every=3)
    run_anew(config)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *_: True)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: torch.zeros(4))
    monkeypatch.setattr("torch.mps.set_rng_state", lambda state: state)
    monkeypatch.setattr(Batch, "pin_memory", None)
    there = replace(config, out=str(tmp_path / "mps"), precision="bf16")
    with PretendedMps() as pretended, WithoutDouble():  # type: ignore[no-untyped-call]
        run_anew(there)
    assert pretended.asked > 20
    assert "on MPS a run computes in fp32" in caplog.text
    assert same_run(tmp_path / "here", tmp_path / "mps")
    assert saved_steps(tmp_path / "mps") == [6, 7]
    with pytest.raises(InputError, match="fp16 needs a CUDA device, this is mps"):
        fit_precision(replace(there, precision="fp16"))


def test_mps_is_taken_alone_and_unless_the_processor_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert device_kind() == "mps"
    for name, value in (("WORLD_SIZE", "2"), ("ACCELERATE_USE_CPU", "true")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert device_kind() == "cpu"


def test_out_of_memory_on_mps_says_what_to_lower() -> None:
    error = RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GiB)")
    with (
        pytest.raises(InputError, match=r"out of memory: MPS backend .*lower"),
        memory_advice("lower"),
    ):
        raise error
