"""An exported model says what the checkpoint says, in PyTorch and in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run

from panoptic_cache.evaluate.decoder.decode import DecodeConfig, decode
from panoptic_cache.evaluate.export import files as export
from panoptic_cache.evaluate.export.files import (
    ModelAndDecoder,
    export_model,
    export_onnx,
    onnx_difference,
)
from panoptic_cache.evaluate.export.graph import GridDecoder
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.study.corruption import Corruption, corrupted_heads
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoPanoptic
from panoptic_cache.train.encoding import PositionalCode, make_encoding


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


def test_an_export_withdraws_the_graph_of_an_earlier_one(trained: Path, tmp_path: Path) -> None:
    one = Predictor(trained, "cpu")
    for name in ("model.onnx", "model.onnx.data", "model.json", "mine.txt"):
        (tmp_path / name).write_text("of other weights")
    with Storage(str(tmp_path)).locked(), pytest.raises(InputError, match="another run"):
        export_model(one.model, one.state, tmp_path)
    assert len([*tmp_path.iterdir()]) == 4
    export_model(one.model, one.state, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.safetensors", "backbone.json", "state.json", "complete.json", "mine.txt"),
    }


@pytest.mark.slow
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
    codes, logits, maps, labels = session.run(
        list(export.OUTPUTS), {"photo": photos.transpose(0, 3, 1, 2)}
    )
    assert facts["outputs"].keys() == set(export.OUTPUTS)
    expected = ModelAndDecoder(one.model, one.state)(torch.from_numpy(photos).permute(0, 3, 1, 2))
    assert (maps == expected[2].numpy()).mean() > 0.99  # but for ties, up to rounding
    assert maps.shape == (3, 56, 56)
    assert labels.shape == expected[3].shape
    for heads, code_, logit in zip(one.heads(list(photos)), codes, logits, strict=True):
        assert np.allclose(heads.instance.numpy(), code_, atol=1e-4)
        assert np.allclose(heads.semantic.numpy(), logit, atol=1e-4)


@pytest.mark.slow
def test_a_graph_of_any_size_equals_pytorch(run: Run, trained: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime  # noqa: PLC0415

    options = ("--out", tmp_path, "--onnx", "--any-size", "--cells", 40, "--json")
    code, out, _ = run("export", "--checkpoint", trained, *options)
    assert code == 0
    assert json.loads(out)["difference_from_pytorch"] < 1e-4
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["input"]["photo"] == ["batch", 3, "a multiple of 7", "a multiple of 7"]
    assert facts["cells"] == 40
    one = Predictor(trained, "cpu")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for size in ((56, 56), (35, 84), (84, 63)):
        photo = np.random.default_rng(0).integers(0, 256, (1, 3, *size), np.uint8)
        codes, logits, maps, labels = session.run(list(export.OUTPUTS), {"photo": photo})
        expected = ModelAndDecoder(one.model, one.state, 40)(torch.from_numpy(photo))
        assert np.allclose(codes, expected[0].detach().numpy(), atol=1e-4)
        assert np.allclose(logits, expected[1].detach().numpy(), atol=1e-4)
        assert (maps == expected[2].numpy()).mean() > 0.99
        assert labels.shape == expected[3].shape


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    one, out = Predictor(trained, "cpu"), tmp_path / "new"
    limit = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    with monkeypatch.context() as patch:
        patch.setattr(limit, 0)
        (tmp_path / "new" / ".model.onnx").mkdir(parents=True)  # of one that was killed
        export_onnx(one.model, one.state, out)
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.onnx.data", "model.json"}
    moved = out.rename(tmp_path / "moved")
    difference = onnx_difference(one.model, one.state, moved / "model.onnx")
    assert difference is not None
    assert max(difference.values()) < 1e-3
    export_onnx(one.model, one.state, moved)
    assert {path.name for path in moved.iterdir()} == {"model.onnx", "model.json"}


def test_without_onnx_one_line_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    one = Predictor(trained, "cpu")
    with pytest.raises(InputError, match=r"pip install 'panoptic-target-cache\[export\]'"):
        export_onnx(one.model, one.state, tmp_path)
    assert onnx_difference(one.model, one.state, tmp_path / "model.onnx") is None


@pytest.mark.parametrize("name", ["positional", "direct", "classification"])
def test_the_decoder_of_the_graph_finds_what_was_encoded(name: str) -> None:
    encoding = make_encoding(name, 4)
    isthing = torch.tensor([True, False, True])
    segments = torch.zeros(2, 60, 80, dtype=torch.int64)  # 0 = stuff of label 1
    segments[0, 5:20, 5:30], segments[0, 30:50, 40:60] = 1, 2
    segments[1, 5:45, 20:60] = 1
    segments[1, 50:54, 70:75] = 2
    table = torch.tensor([1, 0, 2])  # label of each segment
    found = []
    for index in segments:
        ys, xs = (
            torch.stack([(index == k).nonzero()[:, axis].float().mean() for k in (1, 2)])
            for axis in (0, 1)
        )
        centroids = torch.zeros(3, 2)
        centroids[1:] = torch.stack([(xs + 0.5) / 80, (ys + 0.5) / 60], -1) * 2 - 1
        found.append(encoding.encode(centroids, torch.tensor([False, True, True]))[index])
    target = torch.stack(found).permute(0, 3, 1, 2)
    codes = confident(target, encoding.channels) if name == "classification" else target
    logits = torch.nn.functional.one_hot(table[segments], 3).permute(0, 3, 1, 2).float()
    maps, labels = GridDecoder(encoding, isthing, 40)(codes.float(), logits)
    assert maps.shape == segments.shape
    for index, values, names in zip(segments, maps, labels.tolist(), strict=True):
        assert set(values[index == 0].tolist()) == {2}, "stuff of label 1"
        for k in (1, 2):
            (value,) = set(values[index == k].tolist())
            assert value > 3
            assert names[value - 4] == table[k]
        assert sum(label >= 0 for label in names) == len(set(values[values > 3].tolist()))


@pytest.mark.parametrize("cells", [32, 80])
def test_the_graph_decodes_as_the_decoder_does(tiny_dataset: CocoPanoptic, cells: int) -> None:
    """Codes that drift, with a little noise, at another size than the cells divide."""
    encoding = PositionalCode(3)
    isthing = torch.tensor([category.isthing for category in tiny_dataset.categories])
    graph = GridDecoder(encoding, isthing, cells)
    corruption = Corruption(98, semantic_noise=0.5, drift=3.0)
    instances = 0
    for image in corrupted_heads(tiny_dataset.spread(6), corruption, encoding):
        noise = torch.randn(image.instance.shape, generator=torch.Generator().manual_seed(0))
        heads = (image.instance + 0.05 * noise)[None], image.semantic[None]
        (expected,) = decode(
            *heads,
            encoding=encoding,
            isthing=isthing,
            sizes=[(98, 98)],
            config=DecodeConfig(cells=cells, smoothing=0, min_stuff_area=0),
        )
        (values,), (labels,) = graph(*heads)
        shown = torch.cat([torch.tensor([-1]), torch.arange(len(isthing)), labels])[values].numpy()
        truth = np.array([-1, *(segment.label for segment in expected.segments)])[expected.ids]
        assert (shown == truth).mean() > 0.99
        things = [segment.id for segment in expected.segments if segment.isthing]
        assert (labels >= 0).sum() == len(things)
        for id_ in things:
            values_there = values[torch.from_numpy(expected.ids == id_)]
            assert (values_there == values_there.mode().values).float().mean() > 0.98
        instances += len(things)
    assert instances > 10


def confident(classes: torch.Tensor, channels: int) -> torch.Tensor:
    """(B, K, H, W) class indices -> (B, channels, H, W) logits, the halves one after the other."""
    halves = torch.nn.functional.one_hot(classes, channels // 2).permute(0, 1, 4, 2, 3)
    return 20.0 * halves.flatten(1, 2)
