"""DINOv2 as its authors publish it: a `.pth` file of tensors, without a configuration.

What it is follows from the shapes. A head is 64 channels wide in all four published sizes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from panoptic_cache.pipeline.base.errors import InputError

HEAD_WIDTH = 64
UNREADABLE = (
    *(AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    UnpicklingError,
)
"""What reading a file that is none raises."""
_NAMES = (
    (re.compile(r"^(teacher|student|module|backbone)\."), ""),
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),  # of training with FSDP, in chunks
    (re.compile(r"\.mlp\.w3\."), ".mlp.down_proj."),
)
_JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}
"""Tensors of theirs that hold several of ours."""


def read_original(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes, as transformers names them, and the tensors by the names of our files."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        saved = saved.get("teacher", saved)
        weights: dict[str, Tensor] = {}
        for name, value in saved.items():
            for theirs, ours in _NAMES:
                name = theirs.sub(ours, name)  # noqa: PLW2901
            joined = next((part for part in _JOINED if f".{part}." in name), "")
            parts = _JOINED.get(joined, ("",))
            for part, piece in zip(parts, value.float().chunk(len(parts)), strict=True):
                weights[f"encoder.{name.replace(joined, part) if joined else name}"] = piece
        hidden, _, patch, _ = weights["encoder.patch_embed.proj.weight"].shape
        gated = "encoder.blocks.0.mlp.gate_proj.weight" in weights
        inner = weights[f"encoder.blocks.0.mlp.{'gate_proj' if gated else 'fc1'}.weight"]
        side = math.isqrt(weights["encoder.pos_embed"].shape[1] - 1)
        blocks = {name.split(".")[2] for name in weights if ".blocks." in name}
    except UNREADABLE as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(
            f"no DINOv2 as its authors publish it: {reason}",
            where=file,
            remedy="give a .pth file of github.com/facebookresearch/dinov2, or a folder",
        ) from None
    registers = weights.get("encoder.register_tokens")
    sizes: dict[str, Any] = {
        "model_type": "dinov2" if registers is None else "dinov2_with_registers",
        "hidden_size": hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, hidden // HEAD_WIDTH),
        "patch_size": patch,
        "image_size": side * patch,
        "use_swiglu_ffn": gated,
        # transformers makes a gated layer two thirds as wide as its ratio says.
        "mlp_ratio": 4 if gated else inner.shape[0] // hidden,
    }
    if registers is not None:
        sizes["num_register_tokens"] = registers.shape[1]
    return sizes, weights
