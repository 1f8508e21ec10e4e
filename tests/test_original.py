"""DINOv2's own files: rebuilt from small random models, and compared with these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.backbone import make_backbone, own_weights, their_weights
from panoptic_cache.train.config import ModelConfig


def small(family: str = "Dinov2", **settings: Any) -> Any:
    """A random model of two heads of 64 channels."""
    torch.manual_seed(0)
    design = getattr(transformers, f"{family}Config")(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=7,
        image_size=28,
        **settings,
    )
    model = getattr(transformers, f"{family}Backbone")(design)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def original(model: Any) -> dict[str, torch.Tensor]:
    """The state dict that DINOv2's own class of the same weights would save."""
    state = {f"encoder.{name}": value for name, value in model.state_dict().items()}
    ours = {name.removeprefix("encoder."): v.clone() for name, v in own_weights(state).items()}
    for n in range(len(model.encoder.layer)):
        for kind in ("weight", "bias"):
            names = [f"blocks.{n}.attn.{part}.{kind}" for part in "qkv"]
            ours[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat([ours.pop(name) for name in names])
            if f"blocks.{n}.mlp.gate_proj.{kind}" in ours:
                names = [f"blocks.{n}.mlp.{part}_proj.{kind}" for part in ("gate", "up")]
                ours[f"blocks.{n}.mlp.w12.{kind}"] = torch.cat([ours.pop(name) for name in names])
                ours[f"blocks.{n}.mlp.w3.{kind}"] = ours.pop(f"blocks.{n}.mlp.down_proj.{kind}")
    return ours


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Dinov2", {}),
        ("Dinov2", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegisters", {"num_register_tokens": 4}),
    ],
)
def test_an_original_file_gives_the_same_features(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = small(family, **settings)
    torch.save(original(model), tmp_path / "dinov2.pth")
    config = ModelConfig(backbone=str(tmp_path / "dinov2.pth"), taps=(2, 3))
    loaded = make_backbone(config).eval()
    photo = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        found = loaded(photo).feature_maps
        wanted = model(photo, output_hidden_states=True)
    assert torch.equal(found[-1], wanted.feature_maps[-1])
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    shallow = make_backbone(replace(config, taps=(1, 2)))
    assert shallow.config.num_hidden_layers == 2


def test_a_training_checkpoint_of_the_authors_will_do(tmp_path: Path) -> None:
    model = small()
    weights = {
        "backbone." + name.replace("blocks.", "blocks.0."): value.half()
        for name, value in original(model).items()
    }
    torch.save({"teacher": weights}, tmp_path / "teacher.pth")
    loaded = make_backbone(ModelConfig(backbone=str(tmp_path / "teacher.pth"), taps=(3,)))
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].half().float()), name


def test_gated_layers_of_any_version_of_transformers_are_the_same_in_files() -> None:
    joined = {"encoder.encoder.layer.0.mlp.weights_in.weight": torch.randn(6, 4)}
    apart = own_weights(joined)
    names = [f"encoder.blocks.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert sorted(apart) == names
    assert torch.equal(torch.cat([apart[name] for name in names]), *joined.values())
    for theirs in (
        joined,
        {name.replace("blocks", "encoder.layer"): apart[name] for name in names},
    ):
        assert own_weights(theirs).keys() == apart.keys()
        again = their_weights(apart, theirs)
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[name], value) for name, value in theirs.items())


def test_what_is_no_such_file_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    contents: list[Any] = [{"a": torch.zeros(1)}, [1], {}]
    cases = [None, b"", b"no pickle", *contents]
    for case in cases:
        if isinstance(case, bytes):
            file.write_bytes(case)
        elif case is not None:
            torch.save(case, file)
        with pytest.raises(InputError) as caught:
            make_backbone(ModelConfig(backbone=str(file), taps=(1,)))
        assert "no DINOv2 as its authors publish it" in str(caught.value)
        assert "\n" not in str(caught.value)
    damaged = original(small())
    del damaged["blocks.1.norm1.bias"]
    torch.save(damaged, file)
    with pytest.raises(InputError, match=r"weights do not fit a DINOv2: .*blocks.1.norm1.bias"):
        make_backbone(ModelConfig(backbone=str(file), taps=(3,)))
