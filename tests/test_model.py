"""The model: sizes, taps, weights that are really loaded, gradients where they belong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train import backbone as backbones
from panoptic_cache.train.backbone import FAMILIES, make_backbone
from panoptic_cache.train.config import ModelConfig, OptimConfig, RandomBackbone
from panoptic_cache.train.model import Decoder, PanopticModel, check_size
from panoptic_cache.train.optim import layer_id, parameter_groups

BLOCKS = 4
TINY = ModelConfig(
    backbone="random",
    random=RandomBackbone(hidden_size=16, layers=BLOCKS, heads=2, patch_size=7),
    taps=(1, 2, 3, 4),
    channels=8,
)


def photos(count: int = 2, height: int = 28, width: int = 28) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=random, dtype=torch.uint8)


def seeded(config: ModelConfig = TINY, seed: int = 0, **settings: Any) -> PanopticModel:
    torch.manual_seed(seed)
    return PanopticModel(config, 16, 5, **settings)


def test_scaled_by_itself_a_picture_may_be_darker_or_paler() -> None:
    model = seeded(replace(TINY, normalise="input")).eval()
    photo = photos(2).float() / 255
    with torch.no_grad():
        found, darker = model(photo), model(0.2 * photo + 0.3)
        other = seeded().eval()(photo)
        flat = model(torch.full((1, 3, 28, 28), 0.4))
    assert torch.allclose(found.instance, darker.instance, atol=1e-4)
    assert torch.allclose(found.semantic, darker.semantic, atol=1e-4)
    assert not torch.allclose(found.semantic, other.semantic, atol=1e-2)
    assert torch.isfinite(flat.semantic).all()
    # Each picture alone, so that a batch does not matter.
    with torch.no_grad():
        assert torch.allclose(model(photo[:1]).semantic, found.semantic[:1], atol=1e-5)


# Sizes


@pytest.mark.parametrize(
    ("size", "patch", "nearest"),
    [
        *[(420, 14, None), (518, 14, None), (616, 14, None), (28, 7, None), (224, 16, None)],
        *[(512, 14, 518), (640, 14, 644), (225, 16, 224), (3, 14, 14), (0, 14, 14)],
    ],
)
def test_sizes_that_patches_do_not_tile_are_refused(
    size: int, patch: int, nearest: int | None
) -> None:
    if nearest is None:
        check_size(size, size, patch)
        return
    for height, width in ((size, size), (10 * patch, size), (size, 10 * patch)):
        with pytest.raises(
            InputError, match=rf"{size} pixels are no multiple .* {patch} .*\({nearest} is\)"
        ):
            check_size(height, width, patch)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (7, 7), (28, 42), (112, 119)])
def test_predictions_have_the_photos_size(height: int, width: int) -> None:
    model = seeded().eval()
    with torch.no_grad():
        found = model(photos(2, height, width)).resized((height, width))
    assert found.instance.shape == (2, 16, height, width)
    assert found.semantic.shape == (2, 5, height, width)
    with pytest.raises(InputError, match="no multiple"):
        model(photos(1, height, width + 1))


@pytest.mark.parametrize("size", [420, 518, 616])
def test_published_sizes_run_through_the_published_patches(size: int) -> None:
    config = ModelConfig(backbone="facebook/dinov2-small", taps=(1, 2))
    with torch.device("meta"):
        model = PanopticModel(config, 16, 133, load_weights=False)
        found = model(torch.empty(1, 3, size, size), "instance")
        features = model.features(torch.empty(1, 3, size, size))
    assert found.resized((size, size)).instance.shape == (1, 16, size, size)
    assert features.shape == (1, 256, size // 14 * 8, size // 14 * 8)


@pytest.mark.parametrize(
    "strides", [(2, 1, 2, 2), (1, 1, 1, 1), (2, 2, 2, 2), (4, 1, 1, 1), (1, 3, 4, 5), (3, 2, 1, 2)]
)
def test_the_decoder_multiplies_its_strides(strides: tuple[int, int, int, int]) -> None:
    decoder = Decoder(6, 4, strides)
    with torch.no_grad():
        found = decoder(torch.randn(1, 6, 3, 5))
    factor = math.prod(strides)
    assert found.shape == (1, 4, 3 * factor, 5 * factor)


def test_each_task_runs_its_head() -> None:
    model = seeded().eval()
    with torch.no_grad():
        both = model(photos())
        instance, semantic = model(photos(), "instance"), model(photos(), "semantic")
    assert instance.semantic is None
    assert semantic.instance is None
    assert torch.equal(instance.instance, both.instance)
    assert torch.equal(semantic.semantic, both.semantic)


def test_bytes_and_fractions_are_the_same_photo() -> None:
    model = seeded().eval()
    with torch.no_grad():
        whole, part = model(photos()), model(photos().float() / 255)
    torch.testing.assert_close(whole.instance, part.instance)


def test_pixels_are_normalised_as_the_backbone_was_trained() -> None:
    model = seeded().eval()
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    white = torch.full((1, 3, 7, 7), 255, dtype=torch.uint8)
    with torch.no_grad():
        model(white)
    wanted = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(wanted, abs=1e-5)


# Taps


def test_taps_beyond_the_blocks_are_refused() -> None:
    with pytest.raises(InputError, match=r"tap 5 lies beyond .* 4 blocks \(choose from 1..4\)"):
        make_backbone(replace(TINY, taps=(1, 5)))
    with pytest.raises(InputError, match="tap 13 lies beyond"):
        make_backbone(ModelConfig(taps=(3, 13)), load_weights=False)


def test_blocks_above_the_last_tap_are_dropped_and_taps_are_outputs_of_their_blocks() -> None:
    backbone = make_backbone(replace(TINY, taps=(1, 3))).eval()
    assert backbone.config.num_hidden_layers == 3
    blocks = backbone.encoder.layer
    assert len(blocks) == 3
    outputs: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        maps = backbone(photos().float()).feature_maps
        assert len(maps) == 2
        assert len(outputs) == 3
        for number, found in zip((1, 3), maps, strict=True):
            tokens = backbone.layernorm(outputs[number - 1])[:, 1:]  # without the class token
            wanted = tokens.reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("random", [RandomBackbone(hidden_size=18), RandomBackbone(heads=3)])
def test_a_random_architecture_that_cannot_be_is_refused(random: RandomBackbone) -> None:
    with pytest.raises(InputError, match="hidden_size"):
        make_backbone(replace(TINY, random=random))


# Weights


def small_design() -> Any:
    return Dinov2Config(
        hidden_size=16,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        patch_size=7,
        image_size=28,
        layerscale_value=0.5,
    )


@pytest.mark.parametrize("kind", [Dinov2Backbone, Dinov2Model])
@pytest.mark.parametrize("half", [False, True])
def test_a_folders_weights_are_really_loaded(tmp_path: Path, kind: Any, half: bool) -> None:
    torch.manual_seed(7)
    saved = kind(small_design())
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    saved = saved.half() if half else saved
    saved.save_pretrained(tmp_path)
    backbone = make_backbone(ModelConfig(backbone=str(tmp_path), taps=(2, 3)))
    weights = saved.state_dict()
    loaded = backbone.state_dict()
    assert {name for name in weights if name not in loaded} == {
        name for name in weights if name.startswith("encoder.layer.3.")
    }
    for name, value in loaded.items():
        assert value.dtype == torch.float32  # AdamW needs it
        assert torch.equal(value, weights[name].float()), name


def test_without_weights_only_the_architecture_is_read(tmp_path: Path) -> None:
    Dinov2Backbone(small_design()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = ModelConfig(backbone=str(tmp_path), taps=(2, 3))
    assert make_backbone(config, load_weights=False).config.hidden_size == 16
    with pytest.raises(InputError, match="weights cannot be loaded from the folder"):
        make_backbone(config)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="weights cannot be loaded from the folder"):
        make_backbone(config)


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    saved = Dinov2Model(small_design())
    weights = {
        name: value for name, value in saved.state_dict().items() if "layer.1.mlp" not in name
    }
    saved.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"4 weights are missing, encoder\.layer\.1\.mlp"):
        make_backbone(ModelConfig(backbone=str(tmp_path), taps=(2, 3)))


def test_a_backbone_that_is_nowhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="missing: no backbone of this name or folder"):
        make_backbone(ModelConfig(backbone=str(tmp_path / "missing")))


def test_without_cache_and_network_one_question_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_network(_: object, name: str, **settings: float) -> None:
        asked.append((name, settings["timeout"]))
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(InputError, match="not in the cache and no network: Name or") as caught:
        make_backbone(ModelConfig())
    assert asked == [(ModelConfig().backbone, 10)]
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *_: "/cache/model.safetensors")
    assert backbones.hub_options("facebook/dinov2-base", "config.json") == {
        "local_files_only": True
    }
    assert len(asked) == 1


def test_a_random_encoder_starts_from_sines_and_cosines() -> None:
    backbone = make_backbone(TINY)
    positions = backbone.embeddings.position_embeddings[0].detach()
    assert positions[0].abs().max() == 0  # the class token has no place
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].reshape(side, side, 2, 8)  # halves for rows and columns
    assert (grid[:, :1, 0] == grid[:, :, 0]).all()
    assert (grid[:1, :, 1] == grid[:, :, 1]).all()
    assert torch.equal(grid[:, 0, 0], grid[0, :, 1])
    assert grid.abs().max() <= 0.5
    apart = torch.cdist(positions[1:], positions[1:]) + torch.eye(side**2)
    assert apart.min() > 0.05  # no two patches share a code


# Other families


def other_design(family: str) -> Any:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "patch_size": 7,
        "image_size": 28,
        "num_register_tokens": 3,
        "layerscale_value": 0.5,
    }
    if family == "DINOv3ViT":
        settings["intermediate_size"] = 32
    return getattr(transformers, f"{family}Config")(**settings)


@pytest.mark.parametrize("kind", ["Backbone", "Model"])
@pytest.mark.parametrize("family", ["Dinov2WithRegisters", "DINOv3ViT"])
def test_other_families_load_from_a_folder_and_train(
    tmp_path: Path, family: str, kind: str
) -> None:
    torch.manual_seed(7)
    saved = getattr(transformers, f"{family}{kind}")(other_design(family))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    saved.save_pretrained(tmp_path / "saved")
    config = ModelConfig(backbone=str(tmp_path / "saved"), taps=(2, 3), channels=8)
    model = seeded(config)
    # A base model may keep its blocks under another prefix.
    weights = {name.rsplit("layer.", 1)[-1]: value for name, value in saved.named_parameters()}
    for name, value in model.encoder.named_parameters():
        assert torch.equal(value, weights[name.rsplit("layer.", 1)[-1]]), name

    # Absolute places stay: the same photo gives the same in training.
    with torch.no_grad():
        assert torch.equal(model.train()(photos()).instance, model.eval()(photos()).instance)
    model(photos(), "instance").instance.square().mean().backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None and p.requires_grad}
    assert idle == {"semantic_head.weight", "semantic_head.bias"}

    # Layers and undecayed parameters.
    names = [name for name, _ in model.encoder.named_parameters()]
    found = {
        layer: {name for name in names if layer_id(f"encoder.{name}", 3) == layer}
        for layer in range(5)
    }
    assert all("embeddings." in name for name in found[0])
    assert {"embeddings.cls_token", "embeddings.register_tokens"} <= found[0]
    for block in range(3):
        assert all(f"layer.{block}." in name for name in found[block + 1])
    assert all("norm" in name for name in found[4])
    assert sum(map(len, found.values())) == len(names)
    groups = parameter_groups(model, 3, OptimConfig())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.encoder.named_parameters():
        if parameter.requires_grad:
            matrix = name.endswith("weight") and parameter.ndim > 1
            assert (id(parameter) in decayed) == matrix, name

    # And from a checkpoint's architecture.
    path = tmp_path / "backbone.json"
    model.encoder.config.to_json_file(path, use_diff=False)
    again = seeded(
        replace(config, backbone="nobody/nothing"), seed=1, load_weights=False, architecture=path
    )
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(photos()).instance, model.eval()(photos()).instance)


def test_another_family_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(backbone=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match=r"type vit \(known types: dinov2, .*dinov3_vit\)"):
        make_backbone(config)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not name"):
        make_backbone(config)
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit"}')
    monkeypatch.setitem(FAMILIES, "dinov3_vit", "DINOv33")
    with pytest.raises(InputError, match=r"has no DINOv33Backbone .*--upgrade transformers"):
        make_backbone(config)


# Gradients


def test_the_mask_token_is_frozen_and_each_task_trains_the_rest() -> None:
    model = seeded()
    assert not model.encoder.embeddings.mask_token.requires_grad
    prediction = model(photos(), "instance")
    prediction.instance.square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {
        *("encoder.embeddings.mask_token", "semantic_head.weight", "semantic_head.bias")
    }


def gradients(model: PanopticModel) -> dict[str, torch.Tensor]:
    loss = model(photos(), "instance").instance.square().mean()
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_recomputes_the_same_gradients() -> None:
    plain = gradients(seeded().train())
    model = seeded(replace(TINY, gradient_checkpointing=True)).train()
    calls: list[int] = []
    model.encoder.encoder.layer[0].norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model)
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value)


def test_drop_path_acts_in_training_only() -> None:
    model = seeded(replace(TINY, drop_path=0.5))
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(photos()).instance, model(photos()).instance)
        model.eval()
        assert torch.equal(model(photos()).instance, model(photos()).instance)


def test_heads_run_before_the_resize() -> None:
    model = seeded().eval()
    with torch.no_grad():
        features = model.features(photos())
        found = model(photos())
        assert found.instance.shape[2:] == features.shape[2:] == (32, 32)
        wanted = F.interpolate(model.instance_head(features), size=(28, 28), mode="bilinear")
        torch.testing.assert_close(found.resized((28, 28)).instance, wanted)
        assert model(photos(), "instance").resized((28, 28)).semantic is None
