"""The backbone: DINOv2, DINOv2 with registers or DINOv3, its taps, its weights.

Which one a hub name or a folder holds is what its `config.json` says under `model_type`. All three
hand out feature maps of their blocks through one interface of transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from msgspec import Meta
from safetensors import SafetensorError
from torch import Tensor

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import ModelConfig
from panoptic_cache.train.encoding import cell_centres
from panoptic_cache.train.original import read_original

try:
    import transformers
    from transformers import Dinov2Backbone, Dinov2Config  # noqa: F401 - finds what is broken early
except (ImportError, RuntimeError) as error:
    raise InputError(
        f"transformers cannot load its DINOv2: {str(error).splitlines()[0]}",
        remedy="a torchvision that does not match torch causes this: pip uninstall torchvision",
    ) from error

_OWN_NAMES = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^(encoder\.|model\.)?layers?\.", "blocks."),
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"\.attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)\.", r".attn.\1."),
        (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
        (r"^layernorm\.", "norm."),
    )
)
"""What transformers' versions call a backbone's tensors, and what our files call them."""


def own_name(name: str) -> str:
    """The name of a model's tensor in our files, whatever version of transformers named it.

    It is the one that DINOv2's authors chose, but for queries, keys and values, which they keep
    in one tensor. A name of our own stays as it is.
    """
    part, dot, rest = name.partition(".")
    if part == "encoder":
        for theirs, ours in _OWN_NAMES:
            rest = theirs.sub(ours, rest)
    return part + dot + rest


def own_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model or of a file by our names.

    Gate and values of a gated layer are two tensors; earlier versions of transformers join them.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        own = own_name(name)
        if _JOINED in own:
            for part, half in zip(_HALVES, value.chunk(2), strict=True):
                found[own.replace(_JOINED, part)] = half
        else:
            found[own] = value
    return found


def their_weights(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The other way: tensors by our names as a model of this version of transformers names them."""
    found: dict[str, Tensor] = {}
    for name in names:
        own = own_name(name)
        if _JOINED in own:
            found[name] = torch.cat([weights[own.replace(_JOINED, part)] for part in _HALVES])
        else:
            found[name] = weights[own]
    return found


_JOINED, _HALVES = ".mlp.weights_in.", (".mlp.gate_proj.", ".mlp.up_proj.")
ORIGINAL = ".pth"

FAMILIES = {
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT",
}
"""What transformers calls the classes of a `model_type`."""


def backbone_classes(model_type: str, where: str | Path) -> tuple[Any, Any]:
    """The configuration's and the backbone's class; InputError where there is none."""
    if model_type not in FAMILIES:
        raise InputError(
            f"a backbone of the type {model_type or 'that config.json does not name'}",
            where=where,
            remedy=f"known types: {', '.join(FAMILIES)}",
        )
    name = FAMILIES[model_type]
    try:
        return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Backbone")
    except AttributeError:
        raise InputError(
            f"transformers {transformers.__version__} has no {name}Backbone",
            where=where,
            remedy="pip install --upgrade transformers",
        ) from None


def make_backbone(
    config: ModelConfig, *, load_weights: bool = True, architecture: Path | None = None
) -> Any:
    """A backbone whose feature maps are the taps; see `PanopticModel` for the arguments."""
    if architecture is not None:
        design = _read_design(architecture.parent, architecture.name)
    else:
        design = _design(config)
    blocks, last = design.num_hidden_layers, max(config.taps)
    if last > blocks:
        raise InputError(
            f"tap {last} lies beyond the backbone's {blocks} blocks",
            where="model.taps",
            remedy=f"choose from 1..{blocks}",
        )
    # Blocks above the last tap would compute for nothing, and without gradient stop DDP.
    design.num_hidden_layers = last
    design.drop_path_rate = config.drop_path
    # DINOv3 trained with coordinates stretched at random; a centroid is an absolute position.
    for jitter in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
        if hasattr(design, jitter):
            setattr(design, jitter, None)
    design.stage_names = ["stem", *(f"stage{block}" for block in range(1, last + 1))]
    design.set_output_features_output_indices(out_features=None, out_indices=list(config.taps))
    if load_weights and config.backbone.endswith(ORIGINAL):
        backbone = _load_original(Path(config.backbone), design)
    elif load_weights and config.backbone != "random":
        backbone = _load_weights(config.backbone, design)
    else:
        backbone = backbone_classes(design.model_type, config.backbone)[1](design)
        if load_weights:  # else a checkpoint follows
            start_from_sincos(backbone)
    backbone.embeddings.mask_token.requires_grad_(False)  # never used: it would stop DDP
    if config.gradient_checkpointing:
        enable = getattr(  # the older name warns where the newer one is known
            backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    return backbone


_PUBLISHED = {
    "facebook/dinov2-small": (384, 12, 6),
    "facebook/dinov2-base": (768, 12, 12),
    "facebook/dinov2-large": (1024, 24, 16),
}
"""(hidden size, blocks, heads) of published DINOv2s: enough to build one without a network."""


def _design(config: ModelConfig) -> Any:
    """The architecture that a configuration names, as transformers' configuration."""
    random = config.random
    if config.backbone == "random":
        hidden, blocks, heads = random.hidden_size, random.layers, random.heads
        patch, side = random.patch_size, random.grid * random.patch_size
        if hidden % heads or hidden % 4:
            raise InputError(
                f"hidden_size {hidden} must be a multiple of 4 and of heads {heads}",
                where="model.random",
            )
    elif config.backbone.endswith(ORIGINAL):
        sizes, _ = read_original(Path(config.backbone))
        return backbone_classes(sizes["model_type"], config.backbone)[0].from_dict(sizes)
    elif config.backbone in _PUBLISHED:
        (hidden, blocks, heads), patch, side = _PUBLISHED[config.backbone], 14, 518
    else:
        return _read_design(config.backbone, "config.json")
    return Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=side,
    )


Count = Annotated[int, Meta(ge=1, le=1 << 16)]


class Sizes(msgspec.Struct):
    """The ranges of what a backbone's JSON says, where it says it."""

    hidden_size: Count = 1
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)] = 1
    num_attention_heads: Count = 1
    patch_size: Count = 1
    image_size: Count = 1
    intermediate_size: Count = 1
    num_register_tokens: Annotated[int, Meta(ge=0, le=1000)] = 0
    mlp_ratio: Annotated[float, Meta(gt=0, le=100)] = 4.0
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-6
    rope_theta: Annotated[float, Meta(gt=0)] = 100.0


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files in which a backbone's weights may lie."""


def hub_options(name: str, *files: str) -> dict[str, bool]:
    """How to load files of a hub name or a folder: from the cache, where it has one of them.

    Where it has none, InputError at once if the hub does not answer: transformers would ask five
    times for each of several files, in a minute and a half and 89 lines.
    """
    if Path(name).is_dir():
        return {}
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return {"local_files_only": True}
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        what = f"no backbone of this name or folder: {str(error).splitlines()[0]}"
    except Exception as error:  # noqa: BLE001 - which HTTP library there is depends on its version
        what = f"not in the cache and no network: {str(error).splitlines()[0]}"
    else:
        return {}
    raise InputError(
        what,
        where=name,
        remedy="give a hub name (and a network) or a folder that save_pretrained wrote",
    )


def _read_design(name: str | Path, file: str) -> Any:
    """The architecture in a JSON file of a hub name or a folder."""
    options = hub_options(str(name), file)
    try:
        values, _ = Dinov2Config.get_config_dict(name, _configuration_file=file, **options)
        kind, _ = backbone_classes(str(values.get("model_type", "")), name)
        msgspec.convert(values, Sizes)
        # Private keys and this one can make transformers fetch code from the hub.
        plain = {k: v for k, v in values.items() if k[0] != "_" and "attn_implementation" not in k}
        return kind.from_dict(plain)
    except msgspec.ValidationError as error:
        place = Path(name, file)
        raise InputError(f"no backbone can be built of it: {error}", where=place) from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - huggingface_hub has types of its own
        raise InputError(
            f"no backbone of this name or folder: {str(error).splitlines()[0]}",
            where=name,
            remedy="give a hub name (and a network) or a folder that save_pretrained wrote",
        ) from None


def _load_original(file: Path, architecture: Any) -> Any:
    backbone = backbone_classes(architecture.model_type, file)[1](architecture)
    _, weights = read_original(file)
    weights = {"encoder.mask_token": backbone.embeddings.mask_token.data, **weights}
    names = [f"encoder.{name}" for name in backbone.state_dict()]
    try:
        found = their_weights(weights, names)
        backbone.load_state_dict({name.removeprefix("encoder."): v for name, v in found.items()})
    except (LookupError, RuntimeError) as error:
        raise InputError(f"weights do not fit a DINOv2: {error}", where=file) from None
    return backbone


def _load_weights(name: str, architecture: Any) -> Any:
    _, kind = backbone_classes(architecture.model_type, name)
    options = hub_options(name, *WEIGHTS)
    try:
        backbone, found = kind.from_pretrained(
            name, config=architecture, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "folder" if Path(name).is_dir() else "hub"
        raise InputError(
            f"weights cannot be loaded from the {where}: {str(error).splitlines()[0]}", where=name
        ) from None
    unused = {"embeddings.mask_token"}
    if missing := sorted({*found["missing_keys"]} - unused):  # they would stay random
        raise InputError(
            f"{len(missing)} weights are missing, {missing[0]} first",
            where=name,
            remedy=f"give weights of a {FAMILIES[architecture.model_type]}",
        )
    return backbone.float()  # whatever precision they were saved in


def start_from_sincos(backbone: Any, scale: float = 0.5) -> None:
    """Starts the position embeddings as 2-D sines and cosines.

    Centroids are absolute positions, which a random embedding hides from an encoder that has
    everything to learn.
    """
    positions = backbone.embeddings.position_embeddings  # (1, 1 + n * n, hidden)
    side = math.isqrt(positions.shape[1] - 1)
    quarter = positions.shape[2] // 4
    # From half a period over the picture to one over two patches, the finest a grid can hold.
    finest = math.log2(max(side, 2))
    frequencies = math.pi / 2 * 2 ** torch.linspace(0, finest, quarter)
    angles = cell_centres(side)[:, None] * frequencies  # (n, hidden / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, hidden / 2)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    grid = torch.cat([rows, columns], dim=-1)  # (n, n, hidden)
    with torch.no_grad():
        positions.zero_()
        positions[0, 1:] = scale * grid.reshape(side * side, -1)
