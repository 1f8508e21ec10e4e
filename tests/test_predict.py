"""Photos of any size and kind, and predictions that are empty, missing or wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image, ImageOps

from panoptic_cache.evaluate import prediction_files
from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.photos import predict_photos, unique_names
from panoptic_cache.evaluate.predict import Heads, Pixels, Predictor
from panoptic_cache.evaluate.split import evaluate
from panoptic_cache.evaluate.study.heads import read_meta
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.photo import read_photo
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.sources import list_photos, read_frames

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return Predictor(trained, "cpu")


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3000), (3000, 1), (2400, 1800)])
def test_photos_of_any_size(predictor: Predictor, shape: tuple[int, int]) -> None:
    small = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    photo = np.asarray(cv2.resize(small, shape[::-1])).reshape(*shape, 3)
    result = predictor([photo])[0]
    assert result.ids.shape == shape
    found = np.unique(result.ids)
    assert {segment.id for segment in result.segments} == set(found[found > 0].tolist())
    for segment in result.segments:
        assert segment.area == np.count_nonzero(result.ids == segment.id)


def test_a_photo_of_48_megapixels(predictor: Predictor) -> None:
    size = (6000, 8000)
    labels = torch.full((56, 56), next(c.label for c in predictor.categories if not c.isthing))
    label = next(c.label for c in predictor.categories if c.isthing)
    labels[14:28, 7:28] = label
    logits = torch.nn.functional.one_hot(labels, len(predictor.categories)).permute(2, 0, 1)
    centroid = torch.tensor([[[17.5 / 28 - 1, 21 / 28 - 1]]])
    code = predictor.encoding.encode(centroid, torch.ones(1, 1, dtype=torch.bool))[0, 0]
    codes = code[:, None, None] * (labels == label)
    result = predictor.decode([Heads(codes, logits.float())], [size])[0]
    assert result.ids.shape == size
    thing = next(segment for segment in result.segments if segment.isthing)
    assert thing.label == label
    assert thing.area == pytest.approx(6000 * 8000 * (14 * 21) / 56**2, rel=5e-3)


def same(found: PanopticMap, wanted: PanopticMap) -> bool:
    return np.array_equal(found.ids, wanted.ids) and found.segments == wanted.segments


def test_photos_in_any_form(predictor: Predictor, tiny_root: Path) -> None:
    path = next((tiny_root / "val").iterdir())
    photo = read_photo(path)
    (wanted,) = predictor([photo])
    opaque = np.full((*photo.shape[:2], 1), 255, np.uint8)
    for form in (
        path,
        str(path),
        Image.fromarray(photo),
        np.concatenate([photo, opaque], 2),
        photo.astype(np.float32) / 255,
        photo.astype(np.float64) / 255,
        photo.astype(np.uint16) * 257,
        photo.astype(np.int64),
        torch.from_numpy(photo.copy()),
    ):
        (found,) = predictor([form])  # type: ignore[list-item]
        assert same(found, wanted), type(form)
    gray = photo[..., 0]
    (wanted,) = predictor([np.stack([gray] * 3, 2)])
    for form in (gray, gray[..., None], Image.fromarray(gray), np.stack([gray, gray], 2)):
        assert same(predictor([form])[0], wanted)
    assert len(predictor(np.stack([photo, photo]))) == 2  # type: ignore[arg-type]
    assert len(predictor(iter([photo, gray]))) == 2  # type: ignore[arg-type]
    assert predictor([]) == []
    assert predictor.heads([]) == []


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (np.zeros((3, 40, 40)), r"shape \(3, 40, 40\) is no photo \(give \(H, W, 3\) RGB\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\) is no photo"),
        (np.full((4, 4, 3), 200.0), "float64 values of 200 to 200, not of 0 to 1"),
        (np.full((4, 4, 3), np.nan, np.float32), "float32 values of nan to nan"),
        (np.full((4, 4, 3), -1), "int64 values of -1 to -1, not of 0 to 255"),
        (np.full((4, 4, 3), 70000), "int64 values of 70000"),
        (np.zeros((4, 4, 3), bool), "values of type bool"),
        (np.zeros((4, 4, 3), complex), "values of type complex128"),
        (None, "NoneType is no photo"),
        ({"a": 1}, "dict is no photo"),
        ([[1, 2], [3]], "no photo"),
    ],
)
def test_what_is_no_photo_is_refused(predictor: Predictor, photo: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"photo 2 of 2: {message}") as caught:
        predictor([np.zeros((4, 4, 3), np.uint8), photo])
    assert len(str(caught.value).splitlines()) == 1


def test_a_picture_that_is_cut_short_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(GRAY))
    path.write_bytes(path.read_bytes()[:400])
    with Image.open(path) as picture, pytest.raises(InputError, match="photo 1 of 1: no photo"):
        predictor([picture])


@pytest.mark.parametrize("alone", ["a.jpg", Path("a.jpg"), np.zeros((4, 4, 3), np.uint8)])
def test_a_single_photo_is_no_list(predictor: Predictor, alone: Any) -> None:
    with pytest.raises(InputError, match=r"give a list: predictor\(\[photo\]\)"):
        predictor(alone)


GRAY = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(48, 0)
"""Dark on the left."""


def saved(path: Path, image: Image.Image, **settings: Any) -> Path:
    image.save(path, **settings)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "P", "I;16", "animated"])
def test_photos_of_any_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(GRAY)
    if mode == "I;16":
        path = saved(tmp_path / "a.png", Image.fromarray(GRAY.astype(np.uint16) * 257))
    elif mode == "animated":
        others = [gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        path = saved(tmp_path / "a.gif", gray, save_all=True, append_images=others)
    else:
        suffix = "jpg" if mode == "CMYK" else "png"
        colours = gray.convert("RGB" if mode in {"CMYK", "P"} else mode)
        path = saved(tmp_path / f"a.{suffix}", colours.convert(mode))
    found = read_photo(path)
    assert found.shape == (48, 64, 3)
    assert found.dtype == np.uint8
    tolerance = 40 if mode == "P" else 6  # of a palette that is not the photo's own
    assert np.abs(found.astype(int) - GRAY[..., None]).mean() < tolerance


def test_exif_turns_photos_but_not_annotated_ones(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    lying = Image.fromarray(GRAY).transpose(Image.Transpose.ROTATE_90)
    path = saved(tmp_path / "a.png", lying, exif=exif)
    assert (read_photo(path) == GRAY[..., None]).all()
    assert read_photo(path, upright=False).shape == (64, 48, 3)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(GRAY), exif=exif)
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(read_photo(path), wanted)


def test_an_odd_exif_tag_is_no_damage(tmp_path: Path) -> None:
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    text = struct.pack(">HHII", 291, 2, 6, 38)  # where a number should be
    exif = b"MM\0*" + struct.pack(">IH", 8, 2) + turned + text + bytes(4) + b"hello\0"
    path = saved(tmp_path / "a.jpg", Image.fromarray(GRAY), exif=b"Exif\0\0" + exif)
    with Image.open(path) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert read_photo(path).shape == (64, 48, 3)


def test_unreadable_photos_are_reported(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    saved(tmp_path / "cut.jpg", Image.fromarray(GRAY))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:400])
    saved(tmp_path / "bomb.png", Image.new("1", (15000, 15000)))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(
            InputError, match=rf"{path.name}: photo (damaged: \S|has .* pixels)"
        ) as caught:
            read_photo(path)
        assert str(caught.value).count(str(path)) == 1
    with pytest.raises(InputError, match="no such photo"):
        read_photo(tmp_path / "none.jpg")


def test_a_bad_photo_costs_only_itself(run: Run, trained: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    for path in (folder / "a.jpg", folder / "a.png", folder / "more" / "a.jpg"):
        saved(path, Image.fromarray(GRAY))
    (folder / "b.jpg").write_text("hello")
    command = ("predict", "--checkpoint", trained, "--out", out, "--json")
    code, said, err = run(*command, folder, folder / "more")
    assert code == 3
    assert err.count("left out") == 1
    assert "b.jpg: photo damaged" in err
    shown = json.loads(said)
    assert (shown["pictures"], shown["left_out"]) == (3, 1)
    rows = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert [row["image_id"] for row in rows] == ["a.jpg", "a_2.png", "a_3.jpg"]
    assert {path.stem for path in (out / "panoptic").iterdir()} == {"a", "a_2", "a_3"}
    code, said, err = run(*command, folder / "b.jpg")
    assert (code, said) == (1, "")
    assert len([line for line in err.splitlines() if "b.jpg" in line]) == 1


def test_a_nan_from_the_network_names_the_photo(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (20, 30), "red").save(photo)
    for weight in predictor.model.parameters():
        monkeypatch.setattr(weight, "data", torch.full_like(weight, torch.nan))
    with pytest.raises(InputError, match=r"photo\.png: the network's output holds NaN"):
        predict_photos(predictor, [photo], tmp_path / "out")


def test_names_are_unique() -> None:
    assert unique_names(["a", "a_2", "a", "A", "b"]) == ["a", "a_2", "a_3", "A_4", "b"]
    long = unique_names(["x" * 250, "x" * 251, "\N{SNOWMAN}" * 80])
    assert len(set(long)) == 3
    assert all(len(name.encode()) < 220 for name in long)  # whole characters


def test_photos_with_long_names_are_predicted(run: Run, trained: Path, tmp_path: Path) -> None:
    for name in ("a" * 250, "b"):
        saved(tmp_path / f"{name}.png", Image.fromarray(GRAY))
    code, out, _ = run(
        "predict", tmp_path, "--checkpoint", trained, "--out", tmp_path / "o", "--json"
    )
    assert (code, json.loads(out)["pictures"]) == (0, 2)


def test_a_failure_leaves_what_an_earlier_call_wrote(
    predictor: Predictor, tiny_root: Path, tmp_path: Path
) -> None:
    photos = sorted((tiny_root / "val").iterdir())[:2]
    assert predict_photos(predictor, photos, tmp_path / "out") == (2, 0)
    before = (tmp_path / "out" / "panoptic.json").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(b"none")
    with pytest.raises(InputError):
        predict_photos(predictor, [tmp_path / "bad.jpg"], tmp_path / "out")
    assert (tmp_path / "out" / "panoptic.json").read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to"),
    ],
)
def test_a_device_without_memory_is_one_line(
    predictor: Predictor,
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Predictor, "heads", full)
    photo = next((tiny_root / "val").iterdir())
    with pytest.raises(InputError, match=r"out of memory.*--sizes") as caught:
        predict_photos(predictor, [photo], tmp_path)
    assert caught.value.where == str(photo)


def test_stopped_it_leaves_the_json_of_what_is_done(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [saved(tmp_path / f"{name}.png", Image.fromarray(GRAY)) for name in "abc"]
    run_network, runs = predictor.heads, 0

    def stopped(photos: Sequence[Pixels]) -> list[Heads]:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt
        return run_network(photos)

    monkeypatch.setattr(predictor, "heads", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict_photos(predictor, paths, tmp_path / "out", batch=1)
    rows = json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"]
    assert [row["file_name"] for row in rows] == ["a.png", "b.png"]


def predicted(folder: Path) -> dict[str, bytes]:
    """All that `predict` wrote, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "panoptic.json").read_text())["annotations"]
    return rows


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_killed_it_goes_on_but_not_with_what_changed(
    predictor: Predictor,
    trained: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = sorted((root / "train").iterdir())[:6]
    out, network, runs = tmp_path / "out", predictor.heads, []

    def dying(photos: Sequence[Pixels]) -> list[Heads]:
        runs.append(len(photos))
        if len(runs) == 3:
            raise Killed
        return network(photos)

    predict_photos(predictor, paths[:1], out, batch=2)
    monkeypatch.setattr(predictor, "heads", dying)
    monkeypatch.setattr(prediction_files, "write_json", lambda *_: None)  # no last words
    with pytest.raises(Killed):
        predict_photos(predictor, paths, out, batch=2)
    assert not (out / "panoptic.json").exists(), "of the run before: its PNGs are replaced"
    monkeypatch.undo()
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 1 + 4
    cv2.imwrite(str(paths[1]), np.invert(np.asarray(cv2.imread(str(paths[1])))))
    with pytest.raises(InputError, match="an unfinished run lies here"):
        predict_photos(Predictor(trained, "cpu", flip=True), paths, out)
    decode, again = predictor.decode, []

    def counting(heads: Any, sizes: Any) -> Any:
        again.extend(sizes)
        return decode(heads, sizes)

    monkeypatch.setattr(predictor, "decode", counting)
    assert predict_photos(predictor, paths, out, batch=2) == (6, 0)
    assert len(again) == 3, "two were left, and one has changed"
    predict_photos(predictor, paths, tmp_path / "new", batch=2)
    assert predicted(out) == predicted(tmp_path / "new")


def test_an_evaluation_in_its_folder_is_withdrawn(
    predictor: Predictor, tiny_root: Path, tmp_path: Path
) -> None:
    dataset = read_dataset(CocoLayout.of(tiny_root, "val"))
    evaluate(predictor, dataset, tmp_path)
    predict_photos(predictor, [dataset.records[0].photo], tmp_path)
    key = Path(dataset.records[0].file_name).stem
    files = {f"panoptic/{key}.png", f"overlays/{key}.jpg", "panoptic.json"}
    assert predicted(tmp_path).keys() == files


def test_names_that_are_no_text(predictor: Predictor, root: Path, tmp_path: Path) -> None:
    dataset = read_dataset(CocoLayout.of(root, "val"))
    names = [os.fsdecode(name) for name in (b"caf\xe9.jpg", b"\xff.jpg")]
    paths = [record.photo.rename(root / name) for record, name in zip(dataset.records, names)]  # noqa: B905
    predict_photos(predictor, paths, tmp_path / "p")
    rows = rows_of(tmp_path / "p")
    assert [row["file_name"] for row in rows] == ["caf.png", "photo.png"]
    assert rows[0]["source"] == f"{root}/caf\ufffd.jpg"
    half = "\ud800"  # as JSON may have it
    categories = tuple(replace(one, name=one.name + half) for one in predictor.categories)
    records = [
        replace(record, file_name=name, photo=path)
        for record, name, path in zip(dataset.records, names, paths)  # noqa: B905
    ]
    odd = replace(dataset, records=tuple(records), categories=categories)
    out = tmp_path / "e"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "categories", categories)
        evaluate(predictor, odd, out, heads_folder=out)
    assert read_meta(out).categories == categories
    assert "caf?.jpg" in (out / "report.html").read_text()


def test_two_at_once(predictor: Predictor, tiny_root: Path, tmp_path: Path) -> None:
    photos = sorted((tiny_root / "val").iterdir())[:1]
    with Storage(str(tmp_path)).locked(), pytest.raises(InputError, match="another run"):
        predict_photos(predictor, photos, tmp_path)
    assert not [*(tmp_path / "panoptic").iterdir()]


def test_folders_in_folders(
    run: Run, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "photos"
    for name in ("a.png", "more/a.png", "more/deep/A.PNG", ".hidden.png", ".trash/b.png", "t.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.suffix.lower() == ".png":
            Image.fromarray(GRAY).save(path)
    out = folder / "out"
    command = ("predict", folder, "--checkpoint", trained, "--out", out, "--json")
    caplog.set_level("INFO")
    for more, names, said in (
        ((), ["a.png"], "1 folders, 1 *.txt (--recursive"),
        (("--recursive",), ["a.png", "more/a.png", "more/deep/A.PNG"], "2 hidden"),
    ):
        caplog.clear()
        assert run(*command, *more)[0] == 0
        rows = rows_of(out)
        assert [row["source"] for row in rows] == [str(folder / name) for name in names]
        assert all((out / "panoptic" / row["file_name"]).is_file() for row in rows)
        assert len({row["file_name"] for row in rows}) == len(rows)
        assert said in caplog.text
    (tmp_path / "empty").mkdir()
    code, _, err = run("predict", tmp_path / "empty", "--checkpoint", trained, "--out", out)
    assert (code, err) == (1, f"{tmp_path / 'empty'}: no photo or video in this folder")


def video(path: Path, frames: int = 5) -> Path:
    """A bright bar that moves; the codec has no key frames only, as those of phones."""
    noise = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for number in range(frames):
        frame = noise.integers(0, 60, (48, 64, 3), np.uint8)
        frame[:, 10 * number : 10 * number + 10] = 255
        writer.write(frame)
    writer.release()
    return path


def test_videos_frame_by_frame(run: Run, trained: Path, tmp_path: Path) -> None:
    path, out = video(tmp_path / "v.mp4"), tmp_path / "out"
    command = ("predict", "--checkpoint", trained, "--out", out, "--batch", 2, "--json")
    code, said, _ = run(*command, path)
    assert (code, json.loads(said)["pictures"]) == (0, 5)
    rows = rows_of(out)
    assert [row["image_id"] for row in rows] == [f"v.mp4/{k:06d}" for k in range(5)]
    assert {row["source"] for row in rows} == {str(path)}
    for row in rows:
        assert read_ids(out / "panoptic" / row["file_name"]).shape == (48, 64)
        assert (out / "overlays" / f"{row['image_id']}.jpg").is_file()
    again = (*command, "--out", tmp_path / "few", "--overlays", 2)
    assert run(*again, path, path)[0] == 0
    drawn = {str(p.relative_to(tmp_path / "few")) for p in (tmp_path / "few").rglob("*.jpg")}
    names = {f"{video}/{k:06d}.jpg" for video in ("v.mp4", "v_2.mp4") for k in range(2)}
    assert drawn == {f"overlays/{name}" for name in names}
    for number, pixels in read_frames(path, lambda number: number % 2 == 1):
        assert number % 2 == 1
        assert pixels[:, 10 * number + 2 : 10 * number + 8].mean() > 200
        assert pixels[:, : 10 * number - 4].mean() < 80


@pytest.mark.parametrize(("suffix", "share"), [("mkv", 0.6), ("avi", 0.6), ("avi", 0.99)])
def test_a_video_that_ends_early_keeps_what_is_before(
    run: Run, trained: Path, tmp_path: Path, suffix: str, share: float
) -> None:
    path = video(tmp_path / f"v.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    command = ("predict", path, "--checkpoint", trained, "--out", tmp_path / "out", "--json")
    code, said, err = run(*command)
    found = json.loads(said)
    assert (code, found["left_out"]) == (3, 1)
    assert 0 < found["pictures"] == len(rows_of(tmp_path / "out")) < 5
    assert f"{path}: the video ends early: {found['pictures']} whole frames of 5" in err
    assert len(err.splitlines()) == 1
    path.write_bytes(b"no video")
    code, said, err = run(*command)
    assert (code, said, len(err.splitlines())) == (1, "", 1)
    assert "not a readable video" in err


@pytest.mark.slow
def test_two_processes_predict_the_same(
    predictor: Predictor, trained: Path, root: Path, tmp_path: Path
) -> None:
    folder = root / "train"
    video(folder / "v.mp4")
    (folder / "bad.jpg").write_text("hello")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "cli.py", "predict", str(folder), "--batch", "4"]
    command += ["--checkpoint", str(trained), "--out", str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "bad.jpg" in done.stderr
    assert done.stderr.count("left out") == 1
    paths = list_photos([folder])
    assert predict_photos(predictor, paths, tmp_path / "one", batch=4) == (12 + 5, 1)
    assert predicted(tmp_path / "two") == predicted(tmp_path / "one")


def test_bf16_predicts_nearly_the_same(trained: Path) -> None:
    exact, fast = Predictor(trained, "cpu"), Predictor(trained, "cpu", precision="bf16")
    assert exact.identity != fast.identity
    photo = np.repeat(GRAY[..., None], 3, axis=2)
    one, other = (predictor.heads([photo])[0] for predictor in (exact, fast))
    assert one.semantic.dtype == other.semantic.dtype == torch.float32
    assert not torch.equal(one.semantic, other.semantic)
    assert (one.semantic - other.semantic).abs().max() < 0.1 * one.semantic.abs().max()


def test_a_callers_autocast_does_not_reach_the_decoder(predictor: Predictor) -> None:
    photo = np.repeat(GRAY[..., None], 3, axis=2)
    heads = predictor.heads([photo])
    wanted = predictor.decode(heads, [(48, 64)])[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = predictor.decode(heads, [(48, 64)])[0]
    assert np.array_equal(found.ids, wanted.ids)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:77"])
def test_devices_that_are_not_there(run: Run, trained: Path, tmp_path: Path, device: str) -> None:
    command = ("predict", tmp_path, "--checkpoint", trained, "--out", tmp_path, "--device", device)
    saved(tmp_path / "a.png", Image.fromarray(GRAY))
    code, out, err = run(*command)
    assert (code, out) == (1, "")
    assert f"device {device}: cannot be used" in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def scoring(tiny_root: Path, tmp_path: Path) -> tuple[tuple[object, ...], dict[str, Any]]:
    """A command that scores the content of `pred.json`, which is the truth at first."""
    annotations = tiny_root / "annotations"
    truth = annotations / "panoptic_val.json"
    folder = tmp_path / "pred"
    folder.mkdir()
    for png in (annotations / "panoptic_val").iterdir():
        (folder / png.name).write_bytes(png.read_bytes())
    content = json.loads(truth.read_text())
    return ("score", truth, tmp_path / "pred.json", "--json"), content


def test_empty_predictions_score_zero(
    run: Run, scoring: tuple[tuple[object, ...], dict[str, Any]], tmp_path: Path
) -> None:
    command, content = scoring
    for row in content["annotations"]:
        row["segments_info"] = []
        path = tmp_path / "pred" / row["file_name"]
        cv2.imwrite(str(path), np.zeros((*read_ids(path).shape, 3), np.uint8))
    del content["categories"]
    (tmp_path / "pred.json").write_text(json.dumps(content))
    code, out, _ = run(*command)
    values = json.loads(out)
    assert code == 0
    assert values["All"]["pq"] == 0
    assert values["things_agnostic"]["pq"] == 0
    assert values["semantic"]["miou"] == 0
    assert values["mask_ap"]["ap"] == 0
    assert {row["iou"] for row in values["sizes"] if row["n"]} == {0}
    assert all(found.keys() == {"none"} for found in values["confusion"].values())


def test_predictions_without_scores_have_no_ap(
    run: Run, scoring: tuple[tuple[object, ...], dict[str, Any]], tmp_path: Path
) -> None:
    command, content = scoring
    (tmp_path / "pred.json").write_text(json.dumps(content))
    code, out, _ = run(*command)
    values = json.loads(out)
    assert (code, values["mask_ap"], values["All"]["pq"]) == (0, None, 1)
    for row in content["annotations"]:
        for info in row["segments_info"]:
            info["score"] = 0.5
    (tmp_path / "pred.json").write_text(json.dumps(content))
    assert json.loads(run(*command)[1])["mask_ap"]["ap"] == pytest.approx(1)


@pytest.mark.parametrize("score", ["1e400", "-1e400", "NaN", "Infinity", '"\\ud800"', "null"])
def test_a_score_that_is_no_number_is_none(
    run: Run, scoring: tuple[tuple[object, ...], dict[str, Any]], tmp_path: Path, score: str
) -> None:
    command, content = scoring
    for row in content["annotations"]:
        row["note"] = "\ud800"  # half a pair
        for info in row["segments_info"]:
            info["score"] = "SCORE"
    (tmp_path / "pred.json").write_text(json.dumps(content).replace('"SCORE"', score))
    code, out, _ = run(*command)
    values = json.loads(out)
    assert (code, values["mask_ap"], values["All"]["pq"]) == (0, None, 1)


def test_bad_predictions_are_one_line(
    run: Run, scoring: tuple[tuple[object, ...], dict[str, Any]], tmp_path: Path
) -> None:
    command, content = scoring
    first = content["annotations"][0]

    def fails(part: str) -> None:
        (tmp_path / "pred.json").write_text(json.dumps(content))
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert part in err
        assert len(err.splitlines()) == 1

    removed = first["segments_info"].pop()
    fails(f"segment ids {removed['id']} are in the predicted PNG but not in its JSON")
    first["segments_info"] += [removed, {"id": 77, "category_id": removed["category_id"]}]
    fails("segment ids 77 are in the predicted JSON but not in its PNG")
    first["segments_info"][-1]["category_id"] = 99999
    fails("unknown category 99999")
    first["segments_info"].pop()
    (tmp_path / "pred" / first["file_name"]).write_bytes(b"\x89PNG no more")
    fails(f"image {first['image_id']}")
    (tmp_path / "pred" / first["file_name"]).unlink()
    fails("PNGs missing for 1 of 4 images")
    content["annotations"].pop(0)
    fails("no prediction for 1 of 4 images")
    for row in content["annotations"]:
        row["image_id"] = str(row["image_id"])
    fails("no prediction for 1 of 4 images")  # a number and its text are the same id
    (tmp_path / "pred.json").write_text("[" * 100_000)
    code, out, err = run(*command)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "is no annotation file" in err


def test_other_categories_are_refused(run: Run, trained: Path, root: Path, tmp_path: Path) -> None:
    path = root / "annotations" / "panoptic_val.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 900, "name": "new", "isthing": 1})
    path.write_text(json.dumps(content))
    code, out, err = run(
        *("evaluate", "--checkpoint", trained, "--coco", root, "--split", "val"),
        *("--out", tmp_path / "out", "--json"),
    )
    assert (code, out) == (1, "")
    assert "categories differ: none in the model, 900 new (thing) in the annotations" in err
    assert not (tmp_path / "out").exists()
