"""Layer decay, weight decay and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from panoptic_cache.train.config import ModelConfig, OptimConfig, RandomBackbone
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.optim import layer_id, learning_rate, parameter_groups, set_learning_rate

BLOCKS = 3


@pytest.fixture(scope="module")
def model() -> PanopticModel:
    config = ModelConfig(
        backbone="random",
        random=RandomBackbone(hidden_size=16, layers=BLOCKS, heads=2, patch_size=4),
        taps=(1, 2, BLOCKS),
        channels=8,
    )
    return PanopticModel(config, 16, 5)


def test_every_parameter_has_the_layer_of_its_place(model: PanopticModel) -> None:
    found: dict[int, set[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(layer_id(name, BLOCKS), set()).add(name)
    assert set(found) == {0, 1, 2, 3, 4}
    assert found[0] == {f"encoder.{n}" for n, _ in model.encoder.named_parameters() if "emb" in n}
    blocks = [{name.replace(f".{i - 1}.", ".N.", 1) for name in found[i]} for i in (1, 2, 3)]
    assert blocks[0] == blocks[1] == blocks[2]
    assert sum(len(found[i]) for i in (1, 2, 3)) == sum(
        1 for name, _ in model.encoder.encoder.named_parameters()
    )
    assert {name.split(".")[0] for name in found[4]} == {
        *("decoder", "encoder", "instance_head", "semantic_head")
    }
    assert {name for name in found[4] if name.startswith("encoder.")} == {
        *("encoder.layernorm.weight", "encoder.layernorm.bias")
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.embeddings.cls_token", 0),
        ("encoder.embeddings.position_embeddings", 0),
        ("encoder.embeddings.patch_embeddings.projection.weight", 0),
        ("encoder.encoder.layer.0.norm1.weight", 1),
        ("encoder.encoder.layer.11.mlp.fc1.weight", 12),
        ("encoder.layers.11.mlp.fc1.weight", 12),  # transformers may rename its lists
        ("encoder.layernorm.weight", 13),
        ("decoder.layers.0.weight", 13),
        ("instance_head.bias", 13),
    ],
)
def test_layers_go_by_name(name: str, layer: int) -> None:
    assert layer_id(name, 12) == layer


def test_groups_hold_each_trained_parameter_once(model: PanopticModel) -> None:
    groups = parameter_groups(model, BLOCKS, OptimConfig())
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == trained
    assert id(model.encoder.embeddings.mask_token) not in trained


def test_groups_have_the_scale_and_the_decay_of_their_parameters(model: PanopticModel) -> None:
    config = OptimConfig(layer_decay=0.5, weight_decay=0.1)
    group_of = {
        id(parameter): group
        for group in parameter_groups(model, BLOCKS, config)
        for parameter in group["params"]
    }
    undecayed = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of[id(parameter)]
        assert group["scale"] == 0.5 ** (BLOCKS + 1 - layer_id(name, BLOCKS))
        assert group["weight_decay"] in {0.0, 0.1}
        if not group["weight_decay"]:
            undecayed.add(name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rsplit(".", 1)[-1]
            vector = parameter.ndim == 1  # biases, norms, LayerScale
            token = last in {"cls_token", "position_embeddings"}
            assert (name in undecayed) == (vector or token), name
    assert any("layer_scale" in name for name in undecayed)


def test_the_rate_of_a_group_is_scaled(model: PanopticModel) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, BLOCKS, OptimConfig()), lr=0.0)
    set_learning_rate(optimizer, 2e-3)
    rates = {group["scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {scale: 2e-3 * scale for scale in rates}
    assert sorted(rates) == pytest.approx([0.6**4, 0.6**3, 0.6**2, 0.6, 1.0])


def test_the_schedule_at_its_ends() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step, 101, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[30] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 20 / 90)) / 2)


@given(st.integers(1, 50), st.integers(0, 60))
def test_the_schedule_rises_then_falls_within_its_bounds(steps: int, warmup: int) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.01)
    rates = [learning_rate(config, step, steps, warmup) for step in range(steps)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert all(0 < rate <= 1.0 for rate in rates)
    if len(fall) > 1:
        assert fall[0] == 1.0
        assert fall[-1] == pytest.approx(0.01)
