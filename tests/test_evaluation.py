"""An evaluation over several processes, killed and resumed, gives what one process gives."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import Run
from handmade import hashes
from msgspec import structs

from panoptic_cache.evaluate import prediction_files
from panoptic_cache.evaluate.metric.score import score_image
from panoptic_cache.evaluate.photos import predict_photos
from panoptic_cache.evaluate.predict import Heads, Predictor
from panoptic_cache.evaluate.prediction_files import (
    Journal,
    Noted,
    PredictionRow,
    SegmentRow,
    read_journals,
)
from panoptic_cache.evaluate.split import evaluate, identity_of
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.photo import read_annotated

ROOT = Path(__file__).parents[1]


def results(folder: Path) -> dict[str, Any]:
    """All that an evaluation found, without its times."""
    values: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    del values["seconds_per_image"]
    pngs = {path.name: path.read_bytes() for path in (folder / "panoptic").iterdir()}
    pictures = {path.name: path.read_bytes() for path in (folder / "overlays").iterdir()}
    sheet = (folder / "comparison.png").read_bytes()
    return {
        "scores": values,
        "json": (folder / "panoptic.json").read_text(),
        "pictures": (pngs, pictures, sheet),
    }


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return Predictor(trained, "cpu")


@pytest.fixture(scope="module")
def once(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished evaluation by one process."""
    out = tmp_path_factory.mktemp("once")
    evaluate(predictor, tiny_dataset, out, batch=4, overlays=3)
    return out


def on_two_processes(trained: Path, root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "cli.py", "evaluate", "--checkpoint", str(trained)]
    command += ["--coco", str(root), "--split", "train", "--out", str(out)]
    command += ["--batch", "4", "--overlays", "3", "--device", "cpu", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.slow
def test_two_processes_equal_one(
    trained: Path, tiny_root: Path, once: Path, tmp_path: Path
) -> None:
    done = on_two_processes(trained, tiny_root, tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(once)
    printed = json.loads(done.stdout)  # one object, though two processes ran
    assert printed["images"] == 12
    assert not list(tmp_path.glob("predictions*"))


@pytest.mark.slow
def test_what_one_process_meets_stops_both_with_one_line(
    trained: Path, root: Path, tmp_path: Path
) -> None:
    photo = sorted((root / "train").iterdir())[3]  # the second process' share
    photo.write_bytes(photo.read_bytes()[:100])
    done = on_two_processes(trained, root, tmp_path / "out")
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if photo.name in line]
    assert len(lines) == 1
    assert "photo damaged" in lines[0]
    assert not (tmp_path / "out" / "panoptic.json").exists()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_killed_it_goes_on(
    predictor: Predictor,
    tiny_dataset: CocoPanoptic,
    once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def dying(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return score_image(*arguments, **settings)

    monkeypatch.setattr("panoptic_cache.evaluate.split.score_image", dying)
    with pytest.raises(Killed):
        evaluate(predictor, tiny_dataset, tmp_path, batch=4, overlays=3)
    monkeypatch.undo()
    assert not (tmp_path / "panoptic.json").exists()
    journal = tmp_path / "predictions.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 7
    with journal.open("a") as file:
        file.write('{"image_id": 9000')  # torn by the kill
    damaged = sorted((tmp_path / "panoptic").iterdir())[2]
    damaged.write_bytes(damaged.read_bytes()[:50])

    decode, again = predictor.decode, []

    def counting(heads: Any, sizes: Any) -> Any:
        again.extend(sizes)
        return decode(heads, sizes)

    monkeypatch.setattr(predictor, "decode", counting)
    evaluate(predictor, tiny_dataset, tmp_path, batch=4, overlays=3)
    assert len(again) == 12 - 7 + 1, "what was left, and the damaged one"
    assert results(tmp_path) == results(once)
    assert not journal.exists()


def test_what_changed_after_a_kill_is_done_again(
    predictor: Predictor, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_dataset(CocoLayout.of(root, "val"))
    out = tmp_path / "out"

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files, "write_json", killed)
        with pytest.raises(Killed):
            evaluate(predictor, dataset, out)
    one, two, three, _ = dataset.records
    for path, flip in (
        (one.photo, np.invert),  # the photo
        (two.png, np.fliplr),  # the truth
        (out / "panoptic" / f"{three.key}.png", np.fliplr),  # the prediction
    ):
        cv2.imwrite(str(path), flip(np.asarray(cv2.imread(str(path)))))
    decode, again = predictor.decode, []

    def counting(heads: Any, sizes: Any) -> Any:
        again.extend(sizes)
        return decode(heads, sizes)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "decode", counting)
        evaluate(predictor, dataset, out, overlays=0)
    assert len(again) == 3
    evaluate(predictor, dataset, tmp_path / "new", overlays=0)
    assert results(out) == results(tmp_path / "new")


def test_another_checkpoint_is_not_mixed_in(
    run: Run, trained: Path, tiny_root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(next((trained / "checkpoints").iterdir()), other)
    facts = other / "complete.json"
    facts.write_text(facts.read_text() + "\n")
    out = tmp_path / "out"
    (out / "panoptic").mkdir(parents=True)
    dataset = read_dataset(CocoLayout.of(tiny_root, "val"))
    with Journal(out, identity_of(Predictor(other, "cpu"), dataset)) as journal:
        journal.note(PredictionRow(1, "a.png", []))
    code, _, err = run(
        *("evaluate", "--checkpoint", trained, "--coco", tiny_root, "--split", "val"),
        *("--out", out, "--device", "cpu"),
    )
    assert code == 1
    assert "differs in checkpoint" in err
    assert len(err.splitlines()) == 1
    assert not list((out / "panoptic").iterdir())


@pytest.mark.parametrize(
    ("cells", "message"), [(64, "differs in decoding"), (19, "cells: 19 cells")]
)
def test_the_grid_of_the_decoder_can_be_chosen(
    run: Run, trained: Path, tiny_root: Path, tmp_path: Path, cells: int, message: str
) -> None:
    """Results of the usual one lie in the folder, and are not mixed with those of another."""
    dataset = read_dataset(CocoLayout.of(tiny_root, "val"))
    with Journal(tmp_path, identity_of(Predictor(trained, "cpu"), dataset)) as journal:
        journal.note(PredictionRow(1, "a.png", []))
    code, _, err = run(
        *("evaluate", "--checkpoint", trained, "--coco", tiny_root, "--split", "val"),
        *("--out", tmp_path, "--device", "cpu", "--cells", cells),
    )
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_photos_of_another_folder_are_not_mixed_in(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    with Journal(tmp_path, identity_of(predictor, tiny_dataset)) as journal:
        journal.note(PredictionRow(1, "a.png", []))
    records = [replace(r, photo=tmp_path / r.file_name) for r in tiny_dataset.records]
    with pytest.raises(InputError, match="differs in photos"):
        evaluate(predictor, replace(tiny_dataset, records=tuple(records)), tmp_path)


@pytest.mark.slow
def test_what_an_earlier_evaluation_left_goes_and_nothing_else(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    evaluate(predictor, tiny_dataset, tmp_path, overlays=12)
    mine = [tmp_path / "predictions_notes.jsonl", tmp_path / "panoptic" / "mine.png"]
    for path in mine:
        path.write_text("mine")
    evaluate(predictor, tiny_dataset.spread(3), tmp_path, overlays=2)
    assert all(path.read_text() == "mine" for path in mine)
    assert len(list((tmp_path / "panoptic").iterdir())) == 3 + 1
    assert len(list((tmp_path / "overlays").iterdir())) == 2
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 3
    assert not (tmp_path / "superseded.json").exists()


def test_an_evaluation_that_predicts_nothing_leaves_the_earlier_one(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    evaluate(predictor, tiny_dataset, tmp_path)
    before = hashes(tmp_path)
    first, *rest = tiny_dataset.records
    records = (replace(first, photo=tmp_path / "gone.jpg"), *rest)
    with pytest.raises(InputError, match=r"gone\.jpg"):
        evaluate(predictor, replace(tiny_dataset, records=records), tmp_path)
    assert hashes(tmp_path) == before


@pytest.mark.slow
def test_a_killed_evaluation_is_no_finished_one_and_its_next_sweeps(
    predictor: Predictor,
    tiny_dataset: CocoPanoptic,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate(predictor, tiny_dataset, tmp_path, overlays=12)
    few = tiny_dataset.spread(3)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(predictor, few, tmp_path, overlays=2)
    for name in ("panoptic.json", "scores.json", "report.html", "comparison.png"):
        assert not (tmp_path / name).exists()
    evaluate(predictor, few, tmp_path, overlays=2)
    assert len(list((tmp_path / "panoptic").iterdir())) == 3
    assert len(list((tmp_path / "overlays").iterdir())) == 2


def test_what_predict_left_stays(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    predict_photos(predictor, [record.photo for record in tiny_dataset.records[3:6]], tmp_path)
    before = hashes(tmp_path)
    first = replace(tiny_dataset, records=tiny_dataset.records[:3])
    evaluate(predictor, first, tmp_path, overlays=0)
    after = hashes(tmp_path)
    assert {
        name: after[name] for name in before if name != "panoptic.json"
    }.items() <= before.items()


def test_a_photo_of_another_size_is_the_datasets_fault(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path
) -> None:
    first, *rest = tiny_dataset.records
    wrong = (replace(first, height=first.height + 1), *rest)
    with pytest.raises(InputError, match="sizes differ: photo") as caught:
        evaluate(predictor, replace(tiny_dataset, records=wrong), tmp_path)
    assert caught.value.where == str(first.photo)


@pytest.mark.parametrize("area", ["123", -1, math.nan, 2.5, 10**400])
def test_areas_that_are_none_are_refused(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path, area: Any
) -> None:
    first, *rest = tiny_dataset.records
    segments = (structs.replace(first.segments[0], area=area), *first.segments[1:])
    wrong = (replace(first, segments=segments), *rest)
    with pytest.raises(InputError, match="is no number of pixels"):
        evaluate(predictor, replace(tiny_dataset, records=wrong), tmp_path)


def test_out_of_memory_says_what_to_lower(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path, monkeypatch: Any
) -> None:
    def greedy(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predictor, "heads", greedy)
    with pytest.raises(InputError, match="lower --batch"):
        evaluate(predictor, tiny_dataset, tmp_path)


def test_a_journal_on_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path, {}) as journal:
        journal.note(PredictionRow(0, "a.png", []))
        monkeypatch.setattr(journal, "_file", Full())
        with pytest.raises(InputError, match="No space left"):
            journal.note(PredictionRow(1, "a.png", []))


def test_damaged_weights_are_not_evaluated(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(next((trained / "checkpoints").iterdir()), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(bytes(100))
    with pytest.raises(InputError, match="SHA-256"):
        Predictor(folder, "cpu")


def test_journals_of_all_processes_are_read(tmp_path: Path) -> None:
    identity = {"checkpoint": "a", "decoding": {"cells": (1, 2)}}
    for rank in range(2):
        with Journal(tmp_path, identity, rank) as journal:
            journal.note(PredictionRow(rank, "a.png", [SegmentRow(1, 2, 3, 0.5)]))
    with Journal(tmp_path, identity) as journal:
        journal.note(PredictionRow("c", "c.png", []))
    (tmp_path / "predictions-2.jsonl").write_text('{"chec')
    with (tmp_path / "predictions-1.jsonl").open("a") as file:
        file.write('{"image_id": 7, "file_name": 3}\n{"image_id": 8, "file_name": "a.p')
    rows = read_journals(tmp_path, identity)
    assert rows.keys() == {0, 1, "c"}
    assert rows[1] == Noted(PredictionRow(1, "a.png", [SegmentRow(1, 2, 3, 0.5)]), [])
    with pytest.raises(InputError, match="differs in decoding"):
        read_journals(tmp_path, {**identity, "decoding": {}})
    with Journal(tmp_path, identity, 2) as journal:
        journal.note(PredictionRow(5, "a.png", []))
    assert read_journals(tmp_path, identity).keys() == {0, 1, 5, "c"}


def test_a_journal_names_no_files_elsewhere(
    predictor: Predictor, tiny_dataset: CocoPanoptic, once: Path, tmp_path: Path
) -> None:
    record = tiny_dataset.records[0]
    out, elsewhere = tmp_path / "out", tmp_path / "mine.png"
    (out / "panoptic").mkdir(parents=True)
    shutil.copy(record.png, elsewhere)
    shutil.copy(record.png, out / "panoptic" / f"{record.key}.png")
    with Journal(out, identity_of(predictor, tiny_dataset)) as journal:
        row = PredictionRow(record.image_id, "../../mine.png", [])
        files = [record.photo, record.png, out / "panoptic" / f"{record.key}.png"]
        journal.note(row, files)
    old = {"annotations": [{"image_id": 1, "file_name": "../../mine.png", "segments_info": []}]}
    (out / "superseded.json").write_text(json.dumps(old))
    evaluate(predictor, tiny_dataset, out, batch=4, overlays=3)
    assert results(out) == results(once)
    assert elsewhere.exists()


def test_nan_names_the_photo(
    predictor: Predictor, tiny_dataset: CocoPanoptic, tmp_path: Path, monkeypatch: Any
) -> None:
    network = predictor.heads

    bad = read_annotated(tiny_dataset.records[1])

    def broken(photos: Any) -> Any:
        return [
            Heads(one.instance + torch.nan, one.semantic) if np.array_equal(photo, bad) else one
            for photo, one in zip(photos, network(photos), strict=True)
        ]

    monkeypatch.setattr(predictor, "heads", broken)
    with pytest.raises(InputError, match="NaN") as caught:
        evaluate(predictor, tiny_dataset, tmp_path)
    assert caught.value.where == str(tiny_dataset.records[1].photo)
    assert not (tmp_path / "panoptic.json").exists()
