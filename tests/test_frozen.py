"""Parts that do not train, for a while or for the whole run, and the encoder's own rate."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_runs import finish, make_config, same_run, start_ranks, untimed, weights_of

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import ModelConfig, OptimConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.loop import train as train_run
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.optim import parameter_groups, set_trainable
from panoptic_cache.train.summary import summarize_model

BLOCKS = 4
TINY = ModelConfig(
    backbone="random",
    random=RandomBackbone(hidden_size=16, layers=BLOCKS, heads=2, patch_size=7, grid=4),
    taps=(1, 2, 3, 4),
    channels=8,
)


def trained(config: ModelConfig, *, thawed: bool = False) -> set[str]:
    """Names, by those of files, of what trains."""
    model = PanopticModel(config, 16, 5)
    set_trainable(model, config, thawed=thawed)
    names = zip(model.weights(), model.state_dict(), strict=True)
    return {name for name, theirs in names if model.get_parameter(theirs).requires_grad}


def parts(names: set[str]) -> set[str]:
    """Parts of a model, and of its encoder, that names belong to."""
    return {
        ".".join(n.split(".")[: 3 if ".blocks." in n else 2]) if n[0] == "e" else n.split(".")[0]
        for n in names
    }


HEADS = {"instance_head", "semantic_head"}
ENDS = {*HEADS, "decoder", "encoder.norm"}


def test_what_is_frozen_does_not_train_until_it_is_thawed() -> None:
    everything = trained(TINY)
    assert "encoder.cls_token" in everything
    assert "encoder.mask_token" not in everything
    for part in ("encoder", "decoder"):
        config = replace(TINY, freeze=part)
        assert trained(config) == {n for n in everything if not n.startswith(part)}
        assert trained(config, thawed=True) == everything


@pytest.mark.parametrize("count", [1, 3, 4])
def test_only_the_last_blocks_train(count: int) -> None:
    blocks = {f"encoder.blocks.{n}" for n in range(BLOCKS - count, BLOCKS)}
    config = replace(TINY, trainable_blocks=count)
    assert parts(trained(config)) == ENDS | blocks
    assert parts(trained(config, thawed=True)) == ENDS | blocks
    frozen = replace(config, freeze="encoder")
    assert parts(trained(frozen)) == {*HEADS, "decoder"}
    assert parts(trained(frozen, thawed=True)) == ENDS | blocks


def test_more_blocks_than_there_are_is_a_line() -> None:
    with pytest.raises(InputError, match=r"trainable_blocks: 5 blocks .* \(choose from 1..4\)"):
        trained(replace(TINY, trainable_blocks=5))


def test_what_is_frozen_has_neither_gradient_nor_state() -> None:
    config = replace(TINY, freeze="encoder")
    model = PanopticModel(config, 16, 5)
    set_trainable(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, BLOCKS, OptimConfig()), lr=0.1)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.rand(1, 3, 28, 28), "instance").instance
    output.sum().backward()
    assert not any(tensor.shape[-1] == 16 and tensor.ndim == 3 for tensor in kept)  # no tokens
    optimizer.step()
    encoder = list(model.encoder.parameters())
    assert all(p.grad is None and p not in optimizer.state for p in encoder)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]}.isdisjoint(
        map(id, encoder)
    )


def test_the_encoder_has_a_rate_of_its_own() -> None:
    model = PanopticModel(TINY, 16, 5)
    own = OptimConfig(lr=1e-3, encoder_lr=1e-5, layer_decay=0.5)
    rate_of = {
        id(p): own.lr * group["scale"]
        for group in parameter_groups(model, BLOCKS, own)
        for p in group["params"]
    }
    encoder = model.encoder
    wanted = {
        encoder.layernorm.weight: 1e-5,
        encoder.encoder.layer[3].norm1.weight: 1e-5,
        encoder.encoder.layer[1].mlp.fc1.weight: 1e-5 / 4,
        encoder.embeddings.cls_token: 1e-5 / 16,
        model.instance_head.weight: 1e-3,
        model.decoder.layers[0].weight: 1e-3,
    }
    for parameter, rate in wanted.items():
        assert rate_of[id(parameter)] == pytest.approx(rate)


def test_the_summary_counts_what_trains() -> None:
    config = TrainConfig(model=replace(TINY, backbone="random"))
    config = replace(config, data=replace(config.data, size=28))
    whole = summarize_model(config, 5)
    frozen = summarize_model(replace(config, model=replace(TINY, freeze="encoder")), 5)
    mask = 16  # never trains
    assert whole.state_bytes - frozen.state_bytes == 12 * (whole.parameters["encoder"] - mask)
    assert frozen.activation_bytes_per_image < whole.activation_bytes_per_image
    assert frozen.train_flops_per_image < whole.train_flops_per_image
    assert frozen.parameters == whole.parameters


def thawing(cache: Path, out: Path, **settings: Any) -> TrainConfig:
    """Seven steps; the encoder is frozen for the first four."""
    config = make_config(cache, out, checkpoint_every=1, keep=9, **settings)
    return replace(config, model=replace(config.model, freeze="encoder", freeze_epochs=4 / 3))


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_before_at_and_after_the_thaw(
    tiny_cache: Path, tmp_path: Path
) -> None:
    config = thawing(tiny_cache, tmp_path / "whole", ema=0.5)
    train_run(config)
    saved = [
        {n: v for n, v in load_file(folder / "model.safetensors").items() if n.startswith("enc")}
        for folder in sorted((tmp_path / "whole/checkpoints").iterdir())
    ]
    moved = [
        any(not torch.equal(one[name], other[name]) for name in one)
        for one, other in pairwise(saved)
    ]
    assert moved == [False, False, False, True, True, True]
    for step in (3, 4, 5):
        part = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", part)
        for later in range(step + 1, 8):
            shutil.rmtree(part / f"checkpoints/step_{later:07d}")
        state = torch.load(part / f"checkpoints/step_{step:07d}/optimizer.pt")
        assert any(name.startswith("encoder") for name in state) == (step > 4)
        train_run(replace(config, out=str(part)), resume=True)
        assert same_run(tmp_path / "whole", part)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["encoder", "decoder"])
def test_two_ranks_thaw_as_one_that_accumulates(
    tiny_cache: Path, tmp_path: Path, freeze: Any
) -> None:
    config = thawing(tiny_cache, tmp_path / "one", steps=6)
    model = replace(config.model, drop_path=0.0, freeze=freeze, trainable_blocks=2)
    config = replace(config, model=model)
    train_run(config)
    assert finish(start_ranks(2, train_run, replace(config, out=str(tmp_path / "two")))) == [0, 0]
    for one, other in zip(untimed(tmp_path / "one"), untimed(tmp_path / "two"), strict=True):
        assert one.pop("task") == other.pop("task")
        assert one == pytest.approx(other, rel=1e-3)
    twos = weights_of(tmp_path / "two")
    for name, value in weights_of(tmp_path / "one").items():
        if not name.endswith("attn.k.bias"):  # no gradient but noise, which Adam scales up
            torch.testing.assert_close(value, twos[name], atol=5e-5, rtol=1e-3)
