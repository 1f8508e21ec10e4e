"""What a configuration costs, against the paper's Table 1 and against counting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from panoptic_cache.pipeline.base.config import load_config
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import DataConfig, ModelConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.summary import count, run_cost, summarize_model

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = TrainConfig(
    precision="fp32",
    data=DataConfig(size=28),
    model=ModelConfig(
        backbone="random",
        random=RandomBackbone(hidden_size=16, layers=4, heads=2, patch_size=7),
        taps=(1, 2, 3),
        channels=8,
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions", "encoder", "tokens"),
    [
        ("coco_vitb_420", 91.9, 86.58, 900),
        ("coco_vitl_420", 310, 304.37, 900),
        ("coco_vitl_518", 310, 304.37, 1369),
    ],
)
def test_parameters_meet_the_papers_table(
    name: str, millions: float, encoder: float, tokens: int
) -> None:
    summary = summarize_model(load_config(TrainConfig, CONFIGS / f"{name}.toml"), 133)
    parts = summary.parameters
    assert parts["total"] / 1e6 == pytest.approx(millions, rel=0.01)
    assert parts["encoder"] / 1e6 == pytest.approx(encoder, rel=1e-3)
    assert parts["total"] == parts["encoder"] + parts["decoder"] + parts["heads"]
    assert summary.tokens == tokens
    assert summary.size == int(name.rsplit("_", 1)[-1])


@pytest.mark.slow
def test_a_training_image_of_the_large_model_takes_about_three_teraflop() -> None:
    summary = summarize_model(load_config(TrainConfig, CONFIGS / "coco_vitl_518.toml"), 133)
    assert 2.5e12 < summary.train_flops_per_image < 4e12
    assert summary.flops_per_image < summary.train_flops_per_image / 2


@pytest.mark.slow
def test_a_small_models_numbers_are_those_of_the_model() -> None:
    summary = summarize_model(TINY, 5)
    model = PanopticModel(TINY.model, 16, 5)
    assert summary.parameters == {
        "total": sum(p.numel() for p in model.parameters()),
        "encoder": count(model.encoder),
        "decoder": count(model.decoder),
        "heads": 9 * 8 * (16 + 5) + 16 + 5,
    }
    assert (summary.blocks, summary.taps, summary.patch_size) == (3, (1, 2, 3), 7)
    assert summary.tokens == 16
    with torch.no_grad():
        assert summary.features == model.features(torch.zeros(1, 3, 28, 28)).shape[-1] == 32
    assert summary.state_bytes == 16 * summary.parameters["total"]
    assert len(summary.rows()) == len({name for name, _ in summary.rows()})


@pytest.mark.slow
def test_activations_and_operations_grow_as_they_should() -> None:
    small = summarize_model(TINY, 5)
    half = summarize_model(replace(TINY, precision="bf16"), 5)
    large = summarize_model(replace(TINY, data=DataConfig(size=56)), 5)
    assert half.activation_bytes_per_image == pytest.approx(
        small.activation_bytes_per_image / 2, abs=1
    )
    assert large.flops_per_image > 3.9 * small.flops_per_image
    assert large.activation_bytes_per_image > 3.5 * small.activation_bytes_per_image


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="30 pixels are no multiple"):
        summarize_model(replace(TINY, data=DataConfig(size=30)), 5)


def test_a_runs_hours_follow_from_operations_and_rate() -> None:
    config = replace(TINY, epochs=4, data=replace(TINY.data, batch=32, micro_batch=16))
    summary = summarize_model(config, 5)
    cost = run_cost(summary, config, "a100", gpus=8, images=320)
    assert cost.steps == 40
    flops = 40 * 32 * summary.train_flops_per_image
    assert cost.hours == pytest.approx(flops / (8 * 312e12 * 0.3) / 3600)
    # A rank has 4 of the 32 samples, fewer than its micro-batch.
    memory = summary.state_bytes + 4 * summary.activation_bytes_per_image
    assert cost.gib_per_gpu == pytest.approx(memory / 2**30)
