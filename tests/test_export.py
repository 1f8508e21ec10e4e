"""An exported model says what the checkpoint says, in PyTorch and in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

from evaluate import export
from evaluate.export import export_model, export_onnx, onnx_difference
from evaluate.predict import Predictor
from pipeline.errors import InputError


def test_a_saved_folder_predicts_the_same(trained: Path, tmp_path: Path) -> None:
    one = Predictor(trained, "cpu")
    export_model(one.model, one.state, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *("model.safetensors", "backbone.json", "state.json", "complete.json"),
    }
    two = Predictor(tmp_path / "new", "cpu")
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    (a,), (b,) = one([photo]), two([photo])
    assert np.array_equal(a.ids, b.ids)
    assert a.segments == b.segments
    assert two.categories == one.categories
    assert two.state == one.state


def test_half_an_export_is_none(trained: Path, tmp_path: Path) -> None:
    one = Predictor(trained, "cpu")
    export_model(one.model, one.state, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors has another size"):
        Predictor(tmp_path)


def test_onnx_equals_pytorch(run: Run, trained: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime  # noqa: PLC0415

    code, out, _ = run("export", "--checkpoint", trained, "--out", tmp_path, "--onnx", "--json")
    assert code == 0
    assert json.loads(out)["difference_from_pytorch"] < 1e-4
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["input"] == {
        "photo": ["batch", 3, 56, 56],
        "dtype": "uint8",
        "colours": "RGB",
    }
    one = Predictor(trained, "cpu")
    assert [row["id"] for row in facts["categories"]] == [c.id for c in one.categories]
    # A batch of another size than that it was traced with.
    photos = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    codes, logits = session.run(["codes", "logits"], {"photo": photos.transpose(0, 3, 1, 2)})
    for heads, code_, logit in zip(one.heads(list(photos)), codes, logits, strict=True):
        assert np.allclose(heads.instance.numpy(), code_, atol=1e-4)
        assert np.allclose(heads.semantic.numpy(), logit, atol=1e-4)


def test_without_onnx_one_line_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    one = Predictor(trained, "cpu")
    with pytest.raises(InputError, match=r"pip install 'panoptic-target-cache\[export\]'"):
        export_onnx(one.model, one.state, tmp_path, one.cells)
    assert onnx_difference(one.model, tmp_path / "model.onnx", one.size) is None
