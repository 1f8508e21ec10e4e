"""Configuration: what is understood, and how what is not understood is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import pytest

from panoptic_cache.pipeline.base.config import (
    build_config,
    decode_json,
    fingerprint,
    load_config,
    override,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.stages import load_stages


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Run:
    steps: int
    name: str = "run"
    amp: bool = True
    loss: Literal["norm", "squared"] = "norm"
    limit: int | None = None
    taps: tuple[int, ...] = ()
    optim: Optim = field(default_factory=Optim)


def build(**values: Any) -> Run:
    return build_config(Run, {"steps": 1, **values}, where="run.toml")


def test_defaults_come_from_the_dataclass() -> None:
    assert build() == Run(1)


def test_values_are_converted_to_the_fields_types() -> None:
    run = build(optim={"lr": 1, "betas": [0, 1]}, taps=[3, 6], limit=4, loss="squared", amp=False)
    wanted = Run(1, amp=False, loss="squared", limit=4, taps=(3, 6), optim=Optim(1.0, (0.0, 1.0)))
    assert run == wanted
    assert isinstance(run.optim.lr, float)
    assert build(limit="none").limit is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepps": 3}, r"run\.toml: unknown key stepps \(did you mean steps\?\)"),
        ({"optim": {"lrr": 3}}, r"run\.toml: optim: unknown key lrr \(did you mean lr\?\)"),
        ({"xyz": 3}, r"unknown key xyz \(known: steps, name, amp, loss, limit, taps, optim\)"),
        ({"steps": 1.5}, "steps: Expected `int`, got `float`"),
        ({"steps": "3"}, "steps: Expected `int`, got `str`"),
        ({"steps": True}, "steps: Expected `int`, got `bool`"),
        ({"amp": 1}, "amp: Expected `bool`, got `int`"),
        ({"name": 3}, "name: Expected `str`, got `int`"),
        ({"limit": "many"}, r"limit: Expected `int \| null`, got `str`"),
        ({"loss": "l2"}, r"loss: Invalid enum value 'l2' \(one of norm, squared\)"),
        ({"taps": 3}, "taps: Expected `array`, got `int`"),
        ({"taps": [1, "2"]}, r"taps\[1\]: Expected `int`, got `str`"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas: Expected `array` of length 2, got 1"),
        ({"optim": 3}, "optim: Expected `object`, got `int`"),
    ],
)
def test_what_is_not_understood_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**values)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match=r"run\.toml: lacks `steps`"):
        build_config(Run, {}, where="run.toml")


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("optim.lr=1e-4", {"optim": {"lr": 1e-4}}),
        ("steps=3", {"steps": 3}),
        ("amp=false", {"amp": False}),
        ("taps=[3, 6]", {"taps": [3, 6]}),
        ('name="a=b"', {"name": "a=b"}),
        ("name=vit-l/14", {"name": "vit-l/14"}),
        ("name=", {"name": ""}),
        ("name=a=b", {"name": "a=b"}),
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
    ],
)
def test_a_setting_is_toml_or_else_a_string(setting: str, wanted: dict[str, Any]) -> None:
    assert override({}, [setting]) == wanted


def test_settings_apply_in_order_and_leave_the_file_alone() -> None:
    values = {"optim": {"lr": 1.0, "betas": [0.9, 0.9]}}
    changed = override(values, ["optim.lr=2.0", "optim.lr=3.0", "steps=1"])
    assert changed == {"optim": {"lr": 3.0, "betas": [0.9, 0.9]}, "steps": 1}
    assert values["optim"]["lr"] == 1.0


@pytest.mark.parametrize("setting", ["steps", "=3", "name.x=1"])
def test_settings_that_make_no_sense_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match="--set"):
        override({"name": "run"}, [setting])


def test_a_file_holds_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("# What it reproduces\nsteps = 5\n[optim]\nlr = 0.5\n")
    assert load_config(Run, path) == Run(5, optim=Optim(lr=0.5))
    assert load_config(Run, path, ["steps=6", "optim.lr=2"]) == Run(6, optim=Optim(lr=2.0))


@pytest.mark.parametrize("content", [None, b"steps = = 5", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.toml"):
        load_config(Run, path)


def test_a_date_is_refused_and_no_accident(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 5\nname = 2020-01-01\n")
    with pytest.raises(InputError, match="name: Expected `str`"):
        load_config(Run, path, ["steps=6"])


@pytest.mark.parametrize(
    "values",
    [
        {"size": 420},
        {"fit": "squash"},
        {"fit": "longest", "size": 0},
        {"samples_per_shard": 0},
        {"jpeg_quality": 0},
        {"jpeg_quality": 101},
        {"seed": -1},
    ],
)
def test_render_settings_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RenderConfig(**values)


def number_fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of a configuration, by name, and its type."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            yield from number_fields(cast("type", hint), f"{prefix}{name}.")
        elif "int" in str(hint) or "float" in str(hint):
            yield prefix + name, hint


@pytest.mark.parametrize(("name", "hint"), [*number_fields(TrainConfig)])
def test_every_number_of_a_training_has_a_range(name: str, hint: Any) -> None:
    """Nothing far below zero, far above a million or undefined is taken, in lists neither."""
    length = 4 if "strides" in name else 2
    for wrong in ("-1e9", "-1", "nan", "1e300", str(2**70)):
        value = f"[{', '.join([wrong] * length)}]" if "tuple" in str(hint) else wrong
        if (name, wrong) in {("optim.clip_norm", "1e300"), ("optim.clip_norm", str(2**70))}:
            continue  # as good as inf, which switches clipping off
        with pytest.raises(InputError, match=f"run.toml: {name}"):
            build_config(TrainConfig, override({}, [f"{name}={value}"]), where="run.toml")


@pytest.mark.parametrize(
    "setting",
    [
        *("data.scale=[1, 1e6]", "data.scale=[1.4, 0.7]", "data.batch=0", "data.colour=1.5"),
        *("model.taps=[]", "model.taps=[2, 1]", "model.drop_path=1", "model.random.heads=0"),
        *("optim.betas=[1, 1]", "optim.lr=0", "optim.clip_norm=0", "loss.harmonics=0", "steps=0"),
        *("ema=1", "keep=0", "validation.every=1", 'validation.metric="pq"'),
    ],
)
def test_training_settings_that_make_no_sense_are_refused(setting: str) -> None:
    with pytest.raises(InputError):
        build_config(TrainConfig, override({}, [setting]), where="run.toml")


def test_homes_and_variables_in_paths_are_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("UNSET", raising=False)
    values = override(
        {}, ["out=~/run", "data.cache=$SCRATCH/cache", "validation.cache=${HOME}/val"]
    )
    config = build_config(TrainConfig, values, where="run.toml")
    assert (config.out, config.data.cache) == ("/home/me/run", "/scratch/cache")
    assert config.validation.cache == "/home/me/val"
    assert config.model.backbone == TrainConfig().model.backbone
    url = build_config(TrainConfig, {"data": {"cache": "s3://bucket//~/x"}}, where="run.toml")
    assert url.data.cache == "s3://bucket//~/x"
    for setting in ("out=$UNSET/run", "model.backbone=${UNSET}", "data.cache=a\0b"):
        with pytest.raises(InputError, match=r"UNSET.* is not set|no zero byte"):
            build_config(TrainConfig, override({}, [setting]), where="run.toml")


def test_a_run_that_was_moved_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own `config.toml` has paths relative to the folder in which it was started."""
    project = tmp_path / "project"
    run = project / "runs/first"
    (run / "checkpoints").mkdir(parents=True)
    (project / "runs/cache").mkdir()
    (run / "config.toml").write_text('out = "runs/first"\n[data]\ncache = "runs/cache"\n')
    monkeypatch.chdir(tmp_path)
    (config,) = load_stages(run / "config.toml")
    assert (config.out, config.data.cache) == (str(run), str(project / "runs/cache"))
    assert not caplog.records
    renamed = run.rename(project / "runs/second")
    (config,) = load_stages(renamed / "config.toml")
    assert config.out == "runs/first"
    assert f"which is not its folder; --set out={renamed} goes on in there" in caplog.text
    caplog.clear()
    (config,) = load_stages(renamed / "config.toml", [f"out={renamed}"])
    assert config.out == str(renamed)
    assert not caplog.records
    other = project / "config.toml"  # of no run
    other.write_text('out = "runs/third"\n')
    assert load_stages(other)[0].out == "runs/third"


def test_fingerprints_depend_on_contents_only() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": (2,), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) != fingerprint({"a": 1}, None)


HOSTILE = {
    "deep": (b"[" * 20_000 + b"]" * 20_000, "nested too deeply"),
    "deep object": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested too deeply"),
    "huge number": (b'{"a": ' + b"1" * 5_000 + b"}", "out of range|4300 digits"),
    "no UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "nothing": (b"", "truncated|Expecting"),
}
"""JSON that no reader of ours may fail on in another way than with a ValueError of one line."""


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [object, dict, dict[str, int]])
def test_hostile_json_is_one_line(name: str, kind: type) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(ValueError, match=rf"{message}|Expected `") as caught:
        decode_json(data, kind)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('\ufeff{"a": 1}', {"a": 1}),
        (r'{"a": "\ud800"}', {"a": "\ud800"}),
        ('{"a": Infinity}', {"a": float("inf")}),
    ],
)
def test_json_is_read_as_python_reads_it(text: str, found: dict[str, object]) -> None:
    assert decode_json(text.encode(), dict) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a = " + b"[" * 20_000 + b"]" * 20_000, "nested too deeply"),
        (b".".join([b"a"] * 2_000) + b" = 1", "nested too deeply"),
        (b"a = " + b"1" * 5_000, "not readable as TOML"),
        (b'a = "\xff"', "not readable as TOML"),
    ],
)
def test_hostile_toml_is_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.toml").write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(Run, tmp_path / "a.toml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_in_place_of_a_configuration_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.toml")
    with pytest.raises(InputError, match="not a regular file"):
        load_config(Run, tmp_path / "a.toml")
