"""A trained model as files for others: a folder that `Predictor` loads, and ONNX.

    model.safetensors, backbone.json, state.json, complete.json    a checkpoint without its training
    model.onnx                                                     photo -> panoptic map
    model.onnx.data                                                its weights, above 1.5 GB
    model.json                                                     what a user of it must know

In Python, `Predictor("DIR")` loads the folder. `model.onnx` takes `photo`, (B, 3, S, S) uint8 RGB,
and gives the map and the classes of its instances of `GridDecoder`, `panoptic` and
`instance_labels`, and what they were made of: `codes`, (B, channels, S, S), and `logits`, (B, C, S,
S), float32, for a consumer with a decoder of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from panoptic_cache.evaluate.onnx_decoder import GridDecoder
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.restore import ARCHITECTURE, TrainState

OPSET = 18
NEEDED = ("onnx", "onnxscript")
OUTPUTS = ("codes", "logits", "panoptic", "instance_labels")
MEANING = {
    "panoptic": "(B, S, S): 0 void, 1 to C stuff of label value - 1, above instance value - C - 1",
    "instance_labels": "(B, K): label of each instance, -1 where there is none",
    "codes": "(B, channels, S, S): instance head",
    "logits": "(B, C, S, S): semantic head",
}


class ModelAndDecoder(nn.Module):
    """The network and the decoder as one plain function, for tracing."""

    def __init__(self, model: PanopticModel, state: TrainState, cells: int) -> None:
        super().__init__()
        self.model = model
        encoding = make_encoding(state.config.loss.encoding, state.config.loss.harmonics)
        isthing = torch.tensor([category.isthing for category in state.categories])
        self.decoder = GridDecoder(encoding, isthing, cells)

    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, S, S) uint8 -> the outputs `OUTPUTS`."""
        prediction = self.model(photo, "both").resized(photo.shape[-2:])
        return (
            prediction.instance,
            prediction.semantic,
            *self.decoder(prediction.instance, prediction.semantic),
        )


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
        cells: Of the decoding grid, an axis.

    Raises:
        InputError: ONNX is not installed, or the file cannot be written.
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
    network = ModelAndDecoder(model.cpu().eval(), state, cells)
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
                output_names=list(OUTPUTS),
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
    path = out / "model.onnx"
    try:
        _save(program, path)
    except OSError as error:
        raise cannot_write(error, path) from None
    facts = {
        "input": {"photo": ["batch", 3, size, size], "dtype": "uint8", "colours": "RGB"},
        "outputs": MEANING,
        "fit": state.config.data.fit,
        "encoding": {"name": state.config.loss.encoding, "harmonics": state.config.loss.harmonics},
        "cells": cells,
        "categories": [asdict(category) for category in state.categories],
    }
    storage.write("model.json", (json.dumps(facts, indent=1) + "\n").encode())
    return path


def _save(program: torch.onnx.ONNXProgram, path: Path) -> None:
    """Writes a model, and beside it the weights of one that ONNX takes for too large for a file."""
    weights, half = path.with_name(f"{path.name}.data"), path.with_name(f".{path.name}")
    shutil.rmtree(half, ignore_errors=True)  # of one that was killed
    try:
        half.mkdir()
        # Under its final name, which the model knows its weights by.
        program.save(str(half / path.name))
        if (half / weights.name).exists():
            (half / weights.name).replace(weights)
        else:
            weights.unlink(missing_ok=True)
        (half / path.name).replace(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def onnx_difference(
    model: PanopticModel, state: TrainState, path: Path, cells: int
) -> dict[str, float] | None:
    """How far `model.onnx` is from PyTorch, on noise.

    Returns:
        Of `codes` and `logits` the largest difference over the largest value, of `panoptic` and
        `instance_labels` the share that differs. None where onnxruntime is not installed.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # noqa: PLC0415 - optional

    size = state.config.data.size
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUTS), {"photo": photo.numpy()})
    with torch.no_grad():
        expected = ModelAndDecoder(model.cpu().eval(), state, cells)(photo)
    return {
        name: _difference(one, other.numpy())
        for name, one, other in zip(OUTPUTS, found, expected, strict=True)
    }


def _difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    if other.dtype.kind == "i":
        return float((one != other).mean())
    return float(np.abs(one - other).max() / np.abs(other).max())
