"""The backbone: DINOv2, DINOv2 with registers or DINOv3, its taps, its weights.

Which one a hub name or a folder holds is what its `config.json` says under `model_type`; a `.pth`
file is one of DINOv2's authors. All hand out feature maps of their blocks through one interface of
transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import msgspec
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from msgspec import Meta
from safetensors import SafetensorError
from torch import Tensor

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import ModelConfig, RandomBackbone
from panoptic_cache.train.encoding import cell_centres

try:
    import transformers
    from transformers import Dinov2Backbone, Dinov2Config  # noqa: F401 - finds what is broken early
except (ImportError, RuntimeError) as error:
    raise InputError(
        f"transformers cannot load its DINOv2: {str(error).splitlines()[0]}",
        remedy="a torchvision that does not match torch causes this: pip uninstall torchvision",
    ) from error

FAMILIES = {
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT",
}
"""What transformers calls the classes of a `model_type`."""
ORIGINAL = ".pth"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files in which a backbone's weights may lie."""
_PUBLISHED = {
    "facebook/dinov2-small": RandomBackbone(384, 12, 6, 14, 37),
    "facebook/dinov2-base": RandomBackbone(768, 12, 12, 14, 37),
    "facebook/dinov2-large": RandomBackbone(1024, 24, 16, 14, 37),
}
"""Width, blocks, heads, patch and grid of published DINOv2s: to build one without a network."""

# The names of tensors

_RENAMED = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^(teacher|student|module|backbone)\.", ""),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # of the authors' training with FSDP, in chunks
        (r"^(encoder\.|model\.)?layers?\.", "blocks."),
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"\.attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)\.", r".attn.\1."),
        (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.(weights_out|w3)\.", ".mlp.down_proj."),
        (r"^layernorm\.", "norm."),
    )
)
"""What the authors and transformers' versions call a backbone's tensors, and what our files do."""
_GATED = (".mlp.gate_proj.", ".mlp.up_proj.")
_JOINED = {
    ".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."),
    ".mlp.w12.": _GATED,
    ".mlp.weights_in.": _GATED,
}
"""Tensors of theirs that hold several of ours."""


def own_name(name: str) -> str:
    """The name of a model's tensor in our files, whatever version of transformers named it.

    It is the one that DINOv2's authors chose, where they do not join several tensors into one. A
    name of our own stays as it is.
    """
    part, dot, rest = name.partition(".")
    if part == "encoder":
        for theirs, ours in _RENAMED:
            rest = theirs.sub(ours, rest)
    return part + dot + rest


def _parts(name: str) -> list[str]:
    """The names of our files' tensors that one of a model holds, one after another."""
    own = own_name(name)
    for joined, parts in _JOINED.items():
        if joined in own:
            return [own.replace(joined, part) for part in parts]
    return [own]


def own_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, of a file or of DINOv2's authors by our names."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = _parts(name)
        found |= zip(parts, value.chunk(len(parts)), strict=True)
    return found


def their_weights(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The other way: tensors by our names as a model of this version of transformers names them."""
    found: dict[str, Tensor] = {}
    for name in names:
        parts = [weights[part] for part in _parts(name)]
        found[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found


# The architecture


def make_backbone(
    config: ModelConfig, *, load_weights: bool = True, architecture: Path | None = None
) -> Any:
    """A backbone whose feature maps are the taps; see `PanopticModel` for the arguments."""
    design, kind = _design(config, architecture)
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
    if not load_weights:  # a checkpoint follows
        backbone = kind(design)
    elif config.backbone == "random":
        start_from_sincos(backbone := kind(design))
    elif config.backbone.endswith(ORIGINAL):
        backbone = _load_original(Path(config.backbone), kind(design))
    else:
        backbone = _load_weights(config.backbone, kind, design)
    backbone.embeddings.mask_token.requires_grad_(False)  # never used: it would stop DDP
    if config.gradient_checkpointing:
        enable = getattr(  # the older name warns where the newer one is known
            backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    return backbone


def _design(config: ModelConfig, architecture: Path | None) -> tuple[Any, Any]:
    """The architecture, as transformers' configuration, and the class of its backbone."""
    name, file = config.backbone, "config.json"
    where: str | Path = name
    if architecture is not None:
        name, file = str(architecture.parent), architecture.name
    if architecture is None and name.endswith(ORIGINAL):
        values, _ = _read_original(Path(name))
    elif architecture is None and name in {"random", *_PUBLISHED}:
        sizes = config.random if name == "random" else _PUBLISHED[name]
        hidden, heads = sizes.hidden_size, sizes.heads
        if hidden % heads or hidden % 4:
            raise InputError(
                f"hidden_size {hidden} must be a multiple of 4 and of heads {heads}",
                where="model.random",
            )
        values = {
            "model_type": "dinov2",
            "hidden_size": hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": heads,
            "patch_size": sizes.patch_size,
            "image_size": sizes.grid * sizes.patch_size,
        }
    else:
        where, options = Path(name, file), hub_options(name, file)
        try:
            values, _ = Dinov2Config.get_config_dict(name, _configuration_file=file, **options)
        except Exception as error:  # noqa: BLE001 - huggingface_hub has types of its own
            raise _not_found(error, name) from None
    model_type = values.get("model_type") or "that config.json does not name"
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise InputError(
            f"a backbone of the type {model_type}",
            where=where,
            remedy=f"known types: {', '.join(FAMILIES)}",
        )
    if not hasattr(transformers, f"{family}Backbone"):
        raise InputError(
            f"transformers {transformers.__version__} has no {family}Backbone",
            where=where,
            remedy="pip install --upgrade transformers",
        )
    # Private keys and this one can make transformers fetch code from the hub.
    plain = {k: v for k, v in values.items() if k[0] != "_" and "attn_implementation" not in k}
    try:
        msgspec.convert(plain, Sizes)
        design = getattr(transformers, f"{family}Config").from_dict(plain)
    except Exception as error:  # noqa: BLE001 - huggingface_hub has types of its own
        problem = str(error).splitlines()[0]
        raise InputError(f"no backbone can be built of it: {problem}", where=where) from None
    return design, getattr(transformers, f"{family}Backbone")


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


# The weights


def hub_options(name: str, *files: str) -> dict[str, bool]:
    """How to load files of a hub name or a folder: from the cache, where it has one of them.

    InputError at once where the hub does not answer: transformers would try for 90 seconds.
    """
    if Path(name).is_dir():
        return {}
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return {"local_files_only": True}
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _not_found(error, name) from None
    except Exception as error:  # noqa: BLE001 - which HTTP library there is depends on its version
        raise _not_found(error, name, "not in the cache and no network") from None
    return {}


def _not_found(
    error: Exception, name: str, what: str = "no backbone of this name or folder"
) -> InputError:
    remedy = "give a hub name (and a network) or a folder that save_pretrained wrote"
    return InputError(f"{what}: {str(error).splitlines()[0]}", where=name, remedy=remedy)


def _load_weights(name: str, kind: Any, design: Any) -> Any:
    options = {"config": design, "output_loading_info": True, **hub_options(name, *WEIGHTS)}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports blocks above the last tap; see below
    try:
        backbone, found = kind.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "folder" if Path(name).is_dir() else "hub"
        raise InputError(
            f"weights cannot be loaded from the {where}: {str(error).splitlines()[0]}", where=name
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    if missing := sorted({*found["missing_keys"]} - {"embeddings.mask_token"}):
        what = f"{len(missing)} weights are missing, {missing[0]} first"  # they would stay random
        remedy = f"give weights of a {FAMILIES[design.model_type]}"
        raise InputError(what, where=name, remedy=remedy)
    return backbone.float()  # whatever precision they were saved in


def _load_original(file: Path, backbone: Any) -> Any:
    _, weights = _read_original(file)
    weights = {"encoder.mask_token": backbone.embeddings.mask_token.data, **weights}
    names = [f"encoder.{name}" for name in backbone.state_dict()]
    try:
        found = their_weights(weights, names)
        backbone.load_state_dict({name.removeprefix("encoder."): v for name, v in found.items()})
    except (LookupError, RuntimeError) as error:
        raise InputError(f"weights do not fit a DINOv2: {error}", where=file) from None
    return backbone


def _read_original(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes, as transformers names them, and tensors by our names; the file has only tensors."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        saved = saved.get("teacher", saved)
        weights = own_weights({f"encoder.{name}": value.float() for name, value in saved.items()})
        hidden, _, patch, _ = weights["encoder.patch_embed.proj.weight"].shape
        gated = "encoder.blocks.0.mlp.gate_proj.weight" in weights
        inner = weights[f"encoder.blocks.0.mlp.{'gate_proj' if gated else 'fc1'}.weight"]
        side = math.isqrt(weights["encoder.pos_embed"].shape[1] - 1)
        blocks = {name.split(".")[2] for name in weights if ".blocks." in name}
    except (
        *(AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
        UnpicklingError,
    ) as error:
        raise InputError(
            "no DINOv2 as its authors publish it: "
            + f"{type(error).__name__} {error}".splitlines()[0],
            where=file,
            remedy="give a .pth file of github.com/facebookresearch/dinov2, or a folder",
        ) from None
    sizes: dict[str, Any] = {
        "model_type": "dinov2",
        "hidden_size": hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, hidden // 64),  # in all sizes that they publish
        "patch_size": patch,
        "image_size": side * patch,
        "use_swiglu_ffn": gated,
        # transformers makes a gated layer two thirds as wide as its ratio says.
        "mlp_ratio": 4 if gated else inner.shape[0] // hidden,
    }
    registers = weights.get("encoder.register_tokens")
    if registers is not None:
        sizes["model_type"] = "dinov2_with_registers"
        sizes["num_register_tokens"] = registers.shape[1]
    return sizes, weights


def start_from_sincos(backbone: Any, scale: float = 0.5) -> None:
    """Starts the position embeddings as 2-D sines and cosines.

    Centroids are absolute positions, which a random embedding hides from an encoder that has
    everything to learn.
    """
    positions = backbone.embeddings.position_embeddings  # (1, 1 + n * n, hidden)
    side, quarter = math.isqrt(positions.shape[1] - 1), positions.shape[2] // 4
    # From half a period over the picture to one over two patches, the finest a grid can hold.
    frequencies = math.pi / 2 * 2 ** torch.linspace(0, math.log2(max(side, 2)), quarter)
    angles = cell_centres(side)[:, None] * frequencies  # (n, hidden / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, hidden / 2)
    grid = torch.cat(torch.broadcast_tensors(axis[:, None], axis[None]), -1)  # (n, n, hidden)
    with torch.no_grad():
        positions.zero_()
        positions[0, 1:] = scale * grid.flatten(0, 1)
