"""The command line end to end on tiny data: every command, its JSON, its bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

GOLDEN = Path(__file__).parents[1] / "../shared/golden/pq"


def test_synth_then_preprocess_then_verify_then_inspect(run: Run, tmp_path: Path) -> None:
    scenes, cache = tmp_path / "scenes", tmp_path / "cache"
    assert run("synth", scenes, "--images", 6, "--val-images", 2, "--size", 64)[0] == 0
    code, out, _ = run(
        *("preprocess", "--coco", scenes, "--split", "train", "--out", cache),
        *("--fit", "squash", "--size", 56, "--samples-per-shard", 4, "--workers", 0, "--json"),
    )
    result = json.loads(out)
    assert code == 0
    assert result.keys() == {"images", "written", "quarantined", "shards", "bytes", "seconds"}
    assert (result["images"], result["written"], result["shards"]) == (6, 6, 2)

    code, out, _ = run("verify", cache, "--deep", "--json")
    assert code == 0
    assert json.loads(out) == {"ok": True, "shards": 2, "samples": 6, "problems": []}
    assert run("inspect", cache)[0] == 0
    code, out, _ = run("inspect", cache / "train-00000.tar", "--json")
    keys = [row["key"] for row in json.loads(out)["samples"]]
    assert (code, len(keys)) == (0, 4)
    assert run("inspect", cache, "--sample", keys[0], "--out", tmp_path / "sheet.png")[0] == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000

    (cache / "train-00001.tar").write_bytes(b"")
    code, out, _ = run("verify", cache, "--json")
    assert code == 1
    assert json.loads(out)["problems"][0]["shard"] == "train-00001"


def test_dry_run_writes_nothing(run: Run, tiny_root: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        *("preprocess", "--coco", tiny_root, "--split", "train", "--out", tmp_path / "cache"),
        *("--dry-run", "--json"),
    )
    outlook = json.loads(out)
    assert code == 0
    assert (outlook["images"], outlook["quarantined"], outlook["shards"]) == (12, 0, 1)
    assert outlook["bytes"] > 0
    assert not (tmp_path / "cache").exists()


def test_exit_code_3_when_more_is_left_out_than_allowed(
    run: Run, root: Path, tmp_path: Path
) -> None:
    photo = next((root / "train").iterdir())
    photo.write_bytes(photo.read_bytes()[:200])
    arguments = ("preprocess", "--coco", root, "--split", "train", "--workers", 0)
    code, out, err = run(*arguments, "--out", tmp_path / "a", "--max-bad", 0, "--json")
    assert code == 3
    assert json.loads(out)["quarantined"] == 1
    assert "quarantine.jsonl" in err
    assert run(*arguments, "--out", tmp_path / "a", "--max-bad", 0, "--dry-run")[0] == 3
    line = json.loads((tmp_path / "a" / "quarantine.jsonl").read_text())
    assert line["file"] == photo.name
    assert line["code"] == "photo-damaged"
    assert run(*arguments, "--out", tmp_path / "b", "--max-bad", 0.1)[0] == 0


def test_another_layout_by_three_paths(run: Run, tiny_root: Path, tmp_path: Path) -> None:
    annotations = tiny_root / "annotations"
    code, out, _ = run(
        *("preprocess", "--images", tiny_root / "val", "--out", tmp_path / "cache"),
        *("--panoptic-json", annotations / "panoptic_val.json"),
        *("--panoptic-dir", annotations / "panoptic_val", "--workers", 0, "--json"),
    )
    assert (code, json.loads(out)["written"]) == (0, 4)
    assert (tmp_path / "cache" / "val-00000.tar").exists()
    assert run("preprocess", "--images", tiny_root / "val", "--out", tmp_path / "x")[0] == 2


def test_evaluate_agrees_with_score_on_what_it_wrote(
    run: Run, trained: Path, tiny_root: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        *("evaluate", "--checkpoint", trained, "--coco", tiny_root, "--split", "val"),
        *("--out", tmp_path, "--overlays", 2, "--json"),
    )
    result = json.loads(out)
    assert code == 0
    assert result.pop("images") == 4
    assert result.pop("seconds_per_image").keys() >= {"network", "decode", "score"}
    truth = tiny_root / "annotations" / "panoptic_val.json"
    code, out, _ = run(
        *("score", truth, tmp_path / "panoptic.json", "--pred-dir", tmp_path / "panoptic"),
        "--json",
    )
    assert code == 0
    assert json.loads(out) == result
    assert {path.name for path in tmp_path.iterdir()} == {
        *("panoptic", "panoptic.json", "scores.json", "overlays"),
        *("comparison.png", "report.html"),
    }
    assert len(list((tmp_path / "overlays").iterdir())) == 2
    assert result.keys() >= {"sizes", "things_agnostic", "semantic", "mask_ap", "confusion"}
    assert [row["image_id"] for row in result["worst"]]


def test_predict_any_pictures(run: Run, trained: Path, tiny_root: Path, tmp_path: Path) -> None:
    photos = sorted((tiny_root / "val").iterdir())
    odd = tmp_path / "in"
    odd.mkdir()
    shutil.copy(photos[0], odd / "a.b.jpg")
    shutil.copy(photos[1], odd / "c.jpg")
    code, out, _ = run(
        "predict", odd, photos[2], "--checkpoint", trained, "--out", tmp_path / "out", "--json"
    )
    assert code == 0
    assert json.loads(out)["pictures"] == 3
    rows = json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"]
    assert [row["image_id"] for row in rows] == ["a.b.jpg", "c.jpg", photos[2].name]
    for row in rows:
        assert (tmp_path / "out" / "panoptic" / row["file_name"]).exists()
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 3


@pytest.mark.slow
def test_model_meets_the_papers_totals(run: Run) -> None:
    code, out, _ = run("model", "configs/coco_vitb_420.toml", "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["parameters"]["total"] == pytest.approx(91.9e6, rel=0.01)
    assert summary["taps"] == [3, 6, 9, 12]
    assert run("model", "configs/coco_vitb_420.toml", "--set", "data.size=616")[0] == 0


def test_ceiling(run: Run, tiny_root: Path) -> None:
    code, out, _ = run("ceiling", "--coco", tiny_root, "--split", "val", "--size", 112, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["images"] == 4
    assert result["All"]["pq"] > 0.7


def test_ceiling_with_a_spoiled_semantic_head(run: Run, tiny_root: Path) -> None:
    options = ("--coco", tiny_root, "--split", "val", "--size", 112, "--json")
    code, clean, _ = run("ceiling", *options)
    assert code == 0
    code, spoiled, _ = run("ceiling", *options, "--semantic-noise", 3)
    assert code == 0
    assert json.loads(spoiled)["All"]["pq"] < json.loads(clean)["All"]["pq"]


@pytest.mark.slow
def test_ceiling_on_real_photos(run: Run, coco_sample: Path) -> None:
    code, out, _ = run(
        "ceiling", "--coco", coco_sample, "--split", "val2017", "--size", 420, "--json"
    )
    assert code == 0
    assert json.loads(out)["All"]["pq"] > 0.94


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "more"),
    [("render", ()), ("load", ()), ("decode", ("--size", 84)), ("score", ())],
)
def test_bench_prints_ratios(
    run: Run, tiny_root: Path, part: str, more: tuple[object, ...]
) -> None:
    source = ("--coco", tiny_root, "--split", "val", "--count", 2)
    code, out, _ = run("bench", part, *source, *more, "--json")
    result = json.loads(out)
    assert code == 0
    assert all(timing["ms"] > 0 for timing in result["timings"])
    assert all(ratio > 0 for ratio in result["ratios"].values())


def bad_input(root: Path, tmp_path: Path, trained: Path) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Command lines that must fail, each with a part of the line that says why."""
    broken = tmp_path / "annotations" / "panoptic_broken.json"
    broken.parent.mkdir()
    broken.write_text('{"images": [')
    (tmp_path / "bad.jpg").write_text("no picture")
    (tmp_path / "bad.toml").write_text("[optim]\nlearning_rate = 1.0\n")
    other = tmp_path / "step"
    shutil.copytree(next((trained / "checkpoints").iterdir()), other)
    state = json.loads((other / "state.json").read_text())
    state["config"]["model"]["channels"] = 16
    (other / "state.json").write_text(json.dumps(state))
    sizes = json.loads((other / "complete.json").read_text())
    sizes["state.json"]["size"] = (other / "state.json").stat().st_size
    (other / "complete.json").write_text(json.dumps(sizes))
    cache, out = tmp_path / "cache", tmp_path / "out"
    val = ("--coco", root, "--split", "val")
    return {
        "missing folder": (
            ("preprocess", "--coco", tmp_path / "none", "--split", "val", "--out", cache),
            "no such folder",
        ),
        "wrong split": (
            ("preprocess", "--coco", root, "--split", "test", "--out", cache),
            "splits here: train, val",
        ),
        "unreadable JSON": (
            (
                *("preprocess", "--images", root, "--panoptic-json", broken),
                *("--panoptic-dir", root, "--out", cache),
            ),
            "panoptic_broken.json",
        ),
        "size with native": (("preprocess", *val, "--out", cache, "--size", 64), "--fit"),
        "no cache": (("inspect", tmp_path), "index.json"),
        "no checkpoint": (
            ("evaluate", *val, "--checkpoint", tmp_path, "--out", out),
            "no complete checkpoint",
        ),
        "checkpoint of another configuration": (
            ("evaluate", *val, "--checkpoint", other, "--out", out),
            "do not fit",
        ),
        "no picture": (
            ("predict", tmp_path / "none.jpg", "--checkpoint", trained, "--out", out),
            "no such photo",
        ),
        "damaged picture": (
            ("predict", tmp_path / "bad.jpg", "--checkpoint", trained, "--out", out),
            "photo damaged",
        ),
        "unknown setting": (("model", tmp_path / "bad.toml"), "learning_rate"),
        "no configuration": (("model", tmp_path / "none.toml"), "no such configuration"),
        "no ground truth": (("score", tmp_path / "a.json", tmp_path / "b.json"), "a.json"),
    }


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_1(
    run: Run, tiny_root: Path, trained: Path, tmp_path: Path
) -> None:
    for name, (arguments, part) in bad_input(tiny_root, tmp_path, trained).items():
        code, out, err = run(*arguments)
        assert code == 1, name
        assert part in err, name
        assert len(err.splitlines()) == 1, name
        assert not out, name


@pytest.mark.parametrize("data", [b"[" * 20_000 + b"]" * 20_000, b"1" * 5_000, b'"\xff"', b""])
def test_hostile_json_is_one_line_everywhere(
    run: Run, trained: Path, cache: Path, tiny_root: Path, tmp_path: Path, data: bytes
) -> None:
    bad, good = tmp_path / "bad.json", tiny_root / "annotations/panoptic_val.json"
    bad.write_bytes(data)
    checkpoint = tmp_path / "step"
    shutil.copytree(next((trained / "checkpoints").iterdir()), checkpoint)
    (checkpoint / "complete.json").write_bytes(data)
    for name in ("index.json", "plan.json", "train-00001.json", "quarantine.jsonl"):
        (cache / name).write_bytes(data)
    photo = next((tiny_root / "val").iterdir())
    heads = tmp_path / "heads"
    heads.mkdir()
    (heads / "meta.json").write_bytes(data)
    deep = f"a={data.decode(errors='replace')}"
    for arguments in (
        ("score", bad, good),
        ("score", good, bad, "--pred-dir", good.with_suffix("")),
        (
            *("preprocess", "--images", tiny_root, "--panoptic-json", bad),
            *("--panoptic-dir", tiny_root, "--out", tmp_path / "new"),
        ),
        ("preprocess", "--coco", tiny_root, "--split", "train", "--out", cache, "--workers", 0),
        ("inspect", cache),
        ("inspect", cache / "train-00001.tar"),
        ("verify", cache),
        ("predict", photo, "--checkpoint", checkpoint, "--out", tmp_path / "out"),
        ("bench", "decode", "--heads", heads),
        ("model", "configs/demo.toml", "--set", deep),
    ):
        code, _, err = run(*arguments)
        assert code == (0 if "train-00001.tar" in str(arguments) else 1), arguments
        assert len(err.splitlines()) <= 1, (arguments, err[:500])


EVIL = "a\x1b[2J\x07\r\nERROR: \u202enames \udcff \u00e9" + "x" * 5_000
"""A name that clears the screen, rings, fakes a second line, turns the text and is too wide."""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_reach_the_terminal_as_text(
    cache: Path, tiny_root: Path, tmp_path: Path, encoding: str
) -> None:
    truth = json.loads((tiny_root / "annotations/panoptic_val.json").read_text())
    truth["categories"][0]["name"] = EVIL
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    pngs = tiny_root / "annotations/panoptic_val"
    (cache / os.fsdecode(b"a\x1b[2J\x07\r\n\xff.tar")).write_bytes(b"")
    files = (tmp_path / "truth.json", tmp_path / "truth.json")
    commands: list[tuple[int, list[str | Path]]] = [
        (0, ["score", *files, "--gt-dir", pngs, "--pred-dir", pngs]),
        (1, ["inspect", tmp_path / EVIL[:100]]),
        (1, ["verify", cache]),
    ]
    for code, arguments in commands:
        done = subprocess.run(
            [sys.executable, "cli.py", *map(os.fsencode, arguments)],
            env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
        )  # fmt: skip
        lines = (done.stdout + done.stderr).decode(encoding).split("\n")
        assert done.returncode == code, lines
        assert all(line.isprintable() and len(line) < 2_500 for line in lines)
        assert not any(line.startswith(("ERROR", "Traceback")) for line in lines)
        assert any(r"a\x1b[2J\x07\r\n" in line for line in lines)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing_else(tiny_root: Path, tmp_path: Path, closed: str) -> None:
    scenes = tmp_path / "scenes"
    command = f"{sys.executable} cli.py synth {scenes} --images 1 --val-images 0 --size 32"
    for code in (0, 1):  # made; then refused, as another size is asked for
        assert subprocess.run(f"{command} {closed}", shell=True, check=False).returncode == code
        command = command.replace("--size 32", "--size 33")
    assert (scenes / "annotations/panoptic_train.json").is_file()


@pytest.mark.parametrize(
    ("end", "expected"), [("| true", 0), ("2>&1 >/dev/full", 1), ("2>/dev/full", 0)]
)
def test_a_reader_that_has_gone(cache: Path, end: str, expected: int) -> None:
    command = f"set -o pipefail; {sys.executable} cli.py inspect {cache}/train-00000.tar {end}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == expected, done
    assert "Traceback" not in done.stderr + done.stdout
    assert not expected or done.stdout == "cannot print: No space left on device\n"


WINDOWS = """
import os, signal, sys
from importlib.abc import MetaPathFinder
class Without(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {"fcntl", "resource", "pwd", "grp", "termios"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules.pop(name, None)
for module, names in ((os, "O_NOFOLLOW O_NONBLOCK pread fork sched_getaffinity"),
                      (signal, "pthread_sigmask SIGCHLD SIGALRM setitimer alarm")):
    for name in names.split():
        delattr(module, name)
from panoptic_cache import cli
cli.main()
"""


@pytest.mark.slow
def test_without_what_windows_lacks(tiny_root: Path, tiny_cache: Path, tmp_path: Path) -> None:
    truth = tiny_root / "annotations/panoptic_val.json"
    for arguments in (
        ("score", truth, truth),
        ("verify", tiny_cache, "--deep"),
        ("inspect", tiny_cache, "--out", tmp_path / "a.png"),
        ("synth", tmp_path / "s", "--images", 1, "--val-images", 0, "--size", 32),
    ):
        command = [sys.executable, "-c", WINDOWS, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("synth", "s", "--size", 60_000),
        ("synth", "s", "--images", 10**30),
        ("preprocess", "--coco", "s", "--split", "val", "--out", "c", "--size", 60_000),
    ],
)
def test_sizes_beyond_any_memory_are_wrong_usage(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments)[0] == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 4 GiB"), "out of memory: Unable to allocate 4 GiB"),
        (
            ModuleNotFoundError("No module named 'resource'", name="resource"),
            "this command needs Linux or macOS; on Windows run it under WSL",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("panoptic_cache.pipeline.scenes.scene.write_dataset", fail)
    assert run("synth", "s")[::2] == (1, message)


def test_an_error_is_all_that_standard_error_shows(tmp_path: Path) -> None:
    command = [sys.executable, "cli.py", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not done.stdout
    assert "index.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_golden_scores_through_the_command_line(run: Run) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the golden cases are not on this machine")
    for case in sorted(GOLDEN.iterdir()):
        expected = json.loads((case / "expected.json").read_text())
        arguments = (case / "gt.json", case / "pred.json", "--gt-dir", case / "gt")
        code, out, err = run("score", *arguments, "--pred-dir", case / "pred", "--json")
        if "error" in expected:
            assert (code, out) == (1, ""), case.name
            assert len(err.splitlines()) == 1, case.name
            continue
        found = json.loads(out)
        for group in ("All", "Things", "Stuff"):
            if expected[group] is None:
                assert found[group] is None
            else:
                assert found[group] == pytest.approx(expected[group], abs=1e-12), case.name


@pytest.mark.slow
def test_a_broken_torchvision_is_named(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    facts = tmp_path / "torchvision-0.28.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    command = [sys.executable, "-m", "train", "configs/demo.toml", "--set", f"out={tmp_path}/run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "pip uninstall torchvision" in done.stderr
    assert "Traceback" not in done.stderr
