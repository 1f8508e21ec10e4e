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
    """The state dict that DINOv2's own class of the same weights would save, written by hand."""
    embeddings = model.embeddings
    found = {
        "cls_token": embeddings.cls_token,
        "pos_embed": embeddings.position_embeddings,
        "mask_token": embeddings.mask_token,
        "patch_embed.proj.weight": embeddings.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": embeddings.patch_embeddings.projection.bias,
        "norm.weight": model.layernorm.weight,
        "norm.bias": model.layernorm.bias,
    }
    if hasattr(embeddings, "register_tokens"):
        found["register_tokens"] = embeddings.register_tokens
    for n, block in enumerate(model.encoder.layer):
        at = block.attention
        for kind in ("weight", "bias"):
            thirds = [getattr(part, kind) for part in (at.q_proj, at.k_proj, at.v_proj)]
            found[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(thirds)
            found[f"blocks.{n}.attn.proj.{kind}"] = getattr(at.o_proj, kind)
            for norm in ("norm1", "norm2"):
                found[f"blocks.{n}.{norm}.{kind}"] = getattr(getattr(block, norm), kind)
            mlp = {
                name: getattr(part, kind)
                for name, part in block.mlp.named_children()
                if hasattr(part, kind)
            }
            if "gate_proj" in mlp:
                found[f"blocks.{n}.mlp.w12.{kind}"] = torch.cat([mlp["gate_proj"], mlp["up_proj"]])
                found[f"blocks.{n}.mlp.w3.{kind}"] = mlp["down_proj"]
            else:
                found |= {f"blocks.{n}.mlp.{name}.{kind}": mlp[name] for name in ("fc1", "fc2")}
        found[f"blocks.{n}.ls1.gamma"] = block.layer_scale1.lambda1
        found[f"blocks.{n}.ls2.gamma"] = block.layer_scale2.lambda1
    return {name: value.detach().clone() for name, value in found.items()}


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
