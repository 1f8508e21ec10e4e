"""A trained model as files for others: a folder that `Predictor` loads, and ONNX.

    model.safetensors, backbone.json, state.json, complete.json    a checkpoint without its training
    model.onnx                                                     photo -> codes, logits
    model.json                                                     what a user of it must know

In Python, `Predictor("DIR")` loads the folder. The network of `model.onnx` takes `photo`, (B, 3, S,
S) uint8 RGB, and gives `codes`, (B, channels, S, S), and `logits`, (B, C, S, S), float32.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.storage import Storage
from train.checkpoint import ARCHITECTURE, TrainState
from train.model import PanopticModel

OPSET = 18
NEEDED = ("onnx", "onnxscript")


class HeadsOnly(nn.Module):
    """The network as a plain function, for tracing."""

    def __init__(self, model: PanopticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 -> (B, channels, S, S) codes, (B, C, S, S) logits."""
        prediction = self.model(photo, "both").resized(photo.shape[-2:])
        return prediction.instance, prediction.semantic


def export_model(model: PanopticModel, state: TrainState, out: Path) -> Path:
    """Writes the folder that `Predictor` loads; `complete.json` last.

    Args:
        model: With the weights to save.
        state: Of its training; configuration and categories are kept.
        out: The folder.

    Raises:
        InputError: It cannot be written.
    """
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    files = {
        "model.safetensors": save(weights),
        ARCHITECTURE: model.encoder.config.to_json_string(use_diff=False).encode(),
        "state.json": (json.dumps(asdict(state), indent=1) + "\n").encode(),
    }
    storage = Storage(str(out))
    storage.create()
    storage.remove("complete.json")  # until all files are the new ones
    for name, data in files.items():
        storage.write(name, data)
    sums = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    storage.write("complete.json", (json.dumps(sums, indent=1) + "\n").encode())
    return out


def export_onnx(model: PanopticModel, state: TrainState, out: Path, cells: int) -> Path:
    """Writes `model.onnx`, of any batch and the trained size, and `model.json`.

    Args:
        model: In evaluation mode; moved to the processor.
        state: Of its training.
        out: The folder.
        cells: Of the decoding grid, for `model.json`.

    Raises:
        InputError: ONNX is not installed.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"{' and '.join(missing)} is not installed",
            remedy="pip install 'panoptic-target-cache[export]'",
            code="export-missing",
        )
    storage = Storage(str(out))
    storage.create()
    size = state.config.data.size
    network = HeadsOnly(model.cpu().eval())
    # Two pictures: a batch of one would be taken for a constant.
    photo = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    noisy = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (photo,),
                input_names=["photo"],
                output_names=["codes", "logits"],
                dynamic_shapes={"photo": {0: torch.export.Dim("batch", min=1)}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    program.save(str(out / "model.onnx"))
    facts = {
        "input": {"photo": ["batch", 3, size, size], "dtype": "uint8", "colours": "RGB"},
        "fit": state.config.data.fit,
        "encoding": {"name": state.config.loss.encoding, "harmonics": state.config.loss.harmonics},
        "cells": cells,
        "categories": [asdict(category) for category in state.categories],
    }
    storage.write("model.json", (json.dumps(facts, indent=1) + "\n").encode())
    return out / "model.onnx"


def onnx_difference(model: PanopticModel, path: Path, size: int) -> float | None:
    """Largest difference of `model.onnx` from PyTorch, over the largest output, on noise.

    Returns:
        None where onnxruntime is not installed.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # noqa: PLC0415 - optional

    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"photo": photo.numpy()})
    with torch.no_grad():
        expected = HeadsOnly(model.cpu().eval())(photo)
    return max(
        float(np.abs(one - other.numpy()).max() / np.abs(other.numpy()).max())
        for one, other in zip(found, expected, strict=True)
    )
