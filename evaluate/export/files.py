"""A trained model as files for others: a folder that `Predictor` loads, and ONNX.

    model.safetensors, backbone.json, state.json, complete.json    a checkpoint without optimizer
    model.onnx                                                     photo -> panoptic map
    model.onnx.data                                                its weights, above 1.5 GB
    model.json                                                     how to use model.onnx

`Predictor("DIR")` loads the folder. `model.onnx` takes `photo`, (B, 3, S, S) uint8 RGB or, if asked
for, of any height and width that the patch size divides, and returns
the panoptic map and the classes of its instances (see `GridDecoder`), and the two heads they were
made from, for those who bring their own decoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from panoptic_cache.evaluate.export.graph import GridDecoder
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write
from panoptic_cache.train.checkpoint import ARCHITECTURE, TrainState
from panoptic_cache.train.encoding import GRID_CELLS, make_encoding
from panoptic_cache.train.model import PanopticModel

OPSET = 18
ONNX = ("model.onnx", "model.onnx.data", "model.json")
OUTPUTS = {
    "codes": "(B, channels, S, S) float32: instance head",
    "logits": "(B, C, S, S) float32: semantic head",
    "panoptic": "(B, S, S): 0 void, 1 to C stuff of label value - 1, above instance value - C - 1",
    "instance_labels": "(B, K): label of each instance, -1 where there is none",
}


class ModelAndDecoder(nn.Module):
    """Network and decoder in one module, to be traced."""

    def __init__(self, model: PanopticModel, state: TrainState, cells: int = GRID_CELLS) -> None:
        super().__init__()
        self.model = model
        encoding = make_encoding(state.config.loss.encoding, state.config.loss.harmonics)
        isthing = torch.tensor([category.isthing for category in state.categories])
        self.decoder = GridDecoder(encoding, isthing, cells)

    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, S, S) uint8 -> `OUTPUTS`."""
        heads = self.model(photo, "both").resized(photo.shape[-2:])
        return heads.instance, heads.semantic, *self.decoder(heads.instance, heads.semantic)


def export_model(model: PanopticModel, state: TrainState, out: Path) -> Path:
    """Writes the folder that `Predictor` loads; `complete.json` last.

    The configuration and the categories of `state` are kept. Raises InputError where the folder
    cannot be written.
    """
    weights = {name: value.cpu() for name, value in model.weights().items()}
    files = {
        "model.safetensors": save(weights),
        ARCHITECTURE: model.encoder.config.to_json_string(use_diff=False).encode(),
        "state.json": state.to_json().encode(),
    }
    sums = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    storage = Storage(str(out))
    storage.create()
    with storage.locked():
        for name in ("complete.json", *ONNX):  # an earlier export's, of other weights
            storage.remove(name)
        for name, data in files.items():
            storage.write(name, data)
        storage.write("complete.json", _json(sums))
    return out


def export_onnx(
    model: PanopticModel,
    state: TrainState,
    out: Path,
    *,
    any_size: bool = False,
    cells: int = GRID_CELLS,
) -> Path:
    """Writes `model.onnx`, for any batch at the trained size or any other, and `model.json`.

    The model is moved to the CPU and into evaluation mode; `cells` are those along each axis of
    the graph's grid. Raises InputError where ONNX is not installed, a file cannot be written, or
    there is no such grid.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise InputError(
            f"{' and '.join(missing)} is not installed",
            remedy="pip install 'panoptic-target-cache[export]'",
            code="export-missing",
        )
    storage = Storage(str(out))
    storage.create()
    size, patch = state.config.data.size, model.patch_size
    sides: list[Any] = [size, size]
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if any_size:
        sides = [f"a multiple of {patch}"] * 2
        dynamic |= {2 + at: patch * torch.export.Dim(f"patches_{at}", min=1) for at in range(2)}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            ModelAndDecoder(model.cpu(), state, cells).eval(),
            # Two photos, no squares: the exporter would take a batch of one for a constant, and
            # sides that are equal for the same.
            (torch.zeros(2, 3, size, size + any_size * patch, dtype=torch.uint8),),
            input_names=["photo"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"photo": dynamic},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # with dynamo=True it never is
    path = out / "model.onnx"
    facts = {
        "input": {"photo": ["batch", 3, *sides], "dtype": "uint8", "colours": "RGB"},
        "outputs": OUTPUTS,
        "fit": state.config.data.fit,
        "tile": state.config.data.tile or None,
        "encoding": {"name": state.config.loss.encoding, "harmonics": state.config.loss.harmonics},
        "cells": cells,
        "categories": [asdict(category) for category in state.categories],
    }
    with storage.locked():
        try:
            _save(program, path)
        except OSError as error:
            raise cannot_write(error, path) from None
        storage.write("model.json", _json(facts))
    return path


def onnx_difference(
    model: PanopticModel, state: TrainState, path: Path, *, cells: int = GRID_CELLS
) -> dict[str, float] | None:
    """How far `model.onnx` is from PyTorch on a photo of noise, of any size if it takes that.

    For the heads it is the largest difference, relative to the largest value; for the map and its
    labels the share that differs. None where onnxruntime is not installed.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # noqa: PLC0415 - optional

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    height = width = state.config.data.size
    if not isinstance(session.get_inputs()[0].shape[2], int):
        height, width = height + model.patch_size, width + 2 * model.patch_size
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    found = session.run(list(OUTPUTS), {"photo": photo.numpy()})
    with torch.no_grad():
        expected = ModelAndDecoder(model.cpu(), state, cells).eval()(photo)
    return {
        name: _difference(one, other.numpy())
        for name, one, other in zip(OUTPUTS, found, expected, strict=True)
    }


def _difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    if other.dtype.kind == "i":
        return float((one != other).mean())
    return float(np.abs(one - other).max() / np.abs(other).max())


def _save(program: torch.onnx.ONNXProgram, path: Path) -> None:
    """Writes a model; ONNX puts the weights of a large one into a file beside it."""
    weights, half = path.with_name(f"{path.name}.data"), path.with_name(f".{path.name}")
    shutil.rmtree(half, ignore_errors=True)  # left by a killed export
    try:
        half.mkdir()
        # Under its final name, because the model refers to its weights by that name.
        program.save(str(half / path.name))
        if (half / weights.name).exists():
            (half / weights.name).replace(weights)
        else:
            weights.unlink(missing_ok=True)
        (half / path.name).replace(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's warnings, such as those about torchvision, off standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
