"""Checkpoints: whole or ignored, whatever happens while one is written."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import hashes
from safetensors.torch import load_file, save_file

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train import checkpoint
from panoptic_cache.train.checkpoint import (
    ARCHITECTURE,
    TrainState,
    find_checkpoint,
    incomplete,
    latest_checkpoint,
    read_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from panoptic_cache.train.config import ModelConfig, OptimConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.optim import parameter_groups
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.restore import load_model, load_training, load_weights

BLOCKS = 2
CONFIG = TrainConfig(
    seed=4,
    steps=9,
    model=ModelConfig(
        backbone="random",
        random=RandomBackbone(hidden_size=16, layers=BLOCKS, heads=2, patch_size=7, grid=4),
        taps=(1, BLOCKS),
        channels=8,
    ),
)
CATEGORIES = (Category(7, "cat", True, 0), Category(90, "sky", False, 1))


def make_state(step: int = 3, config: TrainConfig = CONFIG) -> TrainState:
    return TrainState(step, "cache", config, CATEGORIES)


def make_model(config: TrainConfig = CONFIG, seed: int = 0) -> PanopticModel:
    torch.manual_seed(seed)
    return PanopticModel(config.model, 16, len(CATEGORIES))


def make_optimizer(model: PanopticModel, steps: int = 0) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameter_groups(model, BLOCKS, OptimConfig()), lr=1e-3)
    for _ in range(steps):
        photo = torch.rand(1, 3, 14, 14)
        model(photo, "instance").instance.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def save(
    checkpoints: Path,
    step: int,
    *,
    keep: int = 9,
    model: PanopticModel | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    ema: PanopticModel | None = None,
    config: TrainConfig = CONFIG,
) -> Path:
    model = model or make_model()
    return save_checkpoint(
        Ranks(),
        checkpoints,
        make_state(step, config),
        model=model,
        optimizer=optimizer or make_optimizer(model),
        ema=ema,
        keep=keep,
    )


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_holds_what_its_docstring_says(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert folder == tmp_path / "step_0000003"
    names = {"model.safetensors", ARCHITECTURE, "optimizer.pt", "rng_0.pt", "state.json"}
    assert {file.name for file in folder.iterdir()} == {*names, "complete.json"}
    vouched = json.loads((folder / "complete.json").read_text())
    found = hashes(folder)
    assert {name: facts["sha256"] for name, facts in vouched.items()} == {
        name: found[name] for name in names
    }
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]


def test_the_state_can_be_read_with_cat(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    plain = json.loads((folder / "state.json").read_text())
    assert plain["step"] == 3
    assert plain["categories"][1] == {"id": 90, "name": "sky", "isthing": False, "label": 1}
    assert plain["config"]["model"]["taps"] == [1, 2]
    assert read_state(folder) == make_state(3)


def test_a_trained_model_comes_back_without_the_hub(tmp_path: Path) -> None:
    # A name that only the hub could resolve: the checkpoint must not ask for it.
    model = make_model(seed=1)
    named = replace(CONFIG, model=replace(CONFIG.model, backbone="nobody/nothing"))
    save(tmp_path / "checkpoints", 5, model=model, config=named)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step_0000005"):
        loaded, state = load_model(path)
        assert same_weights(loaded, model)
        assert not loaded.training
        assert state == make_state(5, named)
    photo = torch.rand(1, 3, 14, 14)
    with torch.no_grad():
        assert torch.equal(model.eval()(photo).instance, loaded(photo).instance)


def test_training_is_put_back(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer(model, steps=2)
    folder = save(tmp_path, 2, model=model, optimizer=optimizer)
    drawn = torch.rand(3)

    again = make_model(seed=9)
    other = make_optimizer(again)
    assert load_training(folder, again, other, 0) == make_state(2)
    assert torch.equal(torch.rand(3), drawn)
    assert same_weights(again, model)

    def moments(found: torch.optim.Optimizer) -> list[Any]:
        return [{k: v.tolist() for k, v in s.items()} for s in found.state_dict()["state"].values()]

    assert moments(other) == moments(optimizer)
    before = torch.get_rng_state()
    load_training(folder, again, other, 1)  # a rank that was not there
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_or_their_average(tmp_path: Path) -> None:
    model, average = make_model(seed=1), make_model(seed=2)
    folder = save(tmp_path, 2, model=model, ema=average)
    assert same_weights(load_model(folder)[0], average)
    assert same_weights(load_model(folder, weights="ema")[0], average)
    assert same_weights(load_model(folder, weights="model")[0], model)
    again, other = make_model(seed=3), make_model(seed=4)
    load_training(folder, again, make_optimizer(again), 0, ema=other)
    assert same_weights(again, model)
    assert same_weights(other, average)


def test_an_average_that_was_not_kept_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert same_weights(load_model(folder)[0], load_model(folder, weights="model")[0])
    with pytest.raises(InputError, match=r"no moving average .*train with --set ema"):
        load_model(folder, weights="ema")


THEIRS = {
    "4.50": (
        ("blocks.", "encoder.layer."),
        *((f".attn.{k[0]}.", f".attention.attention.{k}.") for k in ("query", "key", "value")),
        (".attn.proj.", ".attention.output.dense."),
    ),
    "5.18": (
        ("blocks.", "encoder.layer."),
        *((f".attn.{k}.", f".attention.{k}_proj.") for k in "qkv"),
        (".attn.proj.", ".attention.o_proj."),
    ),
}
"""How versions of transformers name the tensors of DINOv2, by the names of our files."""


def rename(folder: Path, version: str) -> None:
    """Makes a checkpoint one that an earlier version of this program wrote."""
    common = (
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("pos_embed", "embeddings.position_embeddings"),
        *((name, f"embeddings.{name}") for name in ("cls_token", "mask_token")),
        *((f".ls{n}.gamma", f".layer_scale{n}.lambda1") for n in (1, 2)),
        ("encoder.norm.", "encoder.layernorm."),
    )
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for ours, theirs in (*common, *THEIRS[version]):
            name = name.replace(ours, theirs)  # noqa: PLW2901
        weights[name] = value
    save_file(weights, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    del state["versions"]
    (folder / "state.json").write_text(json.dumps(state))
    vouch(folder)


def vouch(folder: Path) -> None:
    """Makes complete.json say what is there now."""
    found = {name: sha for name, sha in hashes(folder).items() if name != "complete.json"}
    sizes = {name: (folder / name).stat().st_size for name in found}
    facts = {name: {"size": sizes[name], "sha256": found[name]} for name in found}
    (folder / "complete.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("version", THEIRS)
def test_files_of_any_version_of_transformers_load(tmp_path: Path, version: str) -> None:
    model = make_model(seed=1)
    folder = save(tmp_path, 3, model=model)
    names = set(load_file(folder / "model.safetensors"))
    assert {"encoder.pos_embed", "encoder.blocks.1.attn.q.weight", "encoder.norm.bias"} < names
    rename(folder, version)
    assert not names & {
        name for name in load_file(folder / "model.safetensors") if "blocks" in name
    }
    loaded, state = load_model(folder)
    assert same_weights(loaded, model)
    assert state.versions == {}


def test_an_optimizer_that_was_saved_by_numbers_is_put_back(tmp_path: Path) -> None:
    """As version 0.1 saved it."""
    model = make_model()
    optimizer = make_optimizer(model, steps=2)
    folder = save(tmp_path, 2, model=model, optimizer=optimizer)
    assert "encoder.blocks.0.attn.k.weight" in torch.load(folder / "optimizer.pt")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    again = make_model(seed=9)
    other = make_optimizer(again)
    load_training(folder, again, other, 0)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert str(optimizer.state.get(one)) == str(other.state.get(two))


def test_the_versions_stand_in_the_state_and_in_the_message(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    assert state["versions"]["torch"] == torch.__version__
    state["versions"] = {"torch": "2.0", "transformers": "9.1"}
    state["config"]["model"]["channels"] = 9
    (folder / "state.json").write_text(json.dumps(state))
    vouch(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    line = str(caught.value)
    assert "decoder.layers.0.bias is [8], by the configuration [9]" in line
    assert f"written by torch 2.0 transformers 9.1, read by torch {torch.__version__}" in line


HUGE = 10**9


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *[(ARCHITECTURE, {"hidden_size": size}) for size in (HUGE, 60_000, 0, -4, "many", 16.5)],
        *[(ARCHITECTURE, {"num_hidden_layers": size}) for size in (HUGE, 1, "two")],
        *[(ARCHITECTURE, {"num_attention_heads": size}) for size in (0, 3, HUGE)],
        *[(ARCHITECTURE, {"patch_size": 0}), (ARCHITECTURE, {"image_size": HUGE})],
        *[(ARCHITECTURE, {"hidden_act": "none"}), (ARCHITECTURE, {"mlp_ratio": 1e9})],
        (ARCHITECTURE, {"layer_norm_eps": -1.0}),
        *[("state.json", {"taps": [1, HUGE]}), ("state.json", {"channels": HUGE})],
        ("state.json", {"strides": [2, HUGE, 2, 2]}),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_never_built(
    tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    folder = save(tmp_path, 3)
    values = json.loads((folder / file).read_text())
    (values if file == ARCHITECTURE else values["config"]["model"]).update(change)
    (folder / file).write_text(json.dumps(values))
    vouch(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_names_code_of_the_hub(tmp_path: Path) -> None:
    """Else transformers would fetch a kernel of this name."""
    model = make_model(seed=1)
    folder = save(tmp_path, 3, model=model)
    values = json.loads((folder / ARCHITECTURE).read_text())
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        values[key] = "nobody/attention"
    (folder / ARCHITECTURE).write_text(json.dumps(values))
    vouch(folder)
    loaded, _ = load_model(folder)
    assert same_weights(loaded, model)
    assert loaded.encoder.config._attn_implementation == "sdpa"


def drawn() -> list[Any]:
    """From every generator that a checkpoint keeps."""
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]  # noqa: NPY002


@pytest.mark.parametrize("version", ["0.1", "now"])
def test_random_states_come_back(tmp_path: Path, version: str) -> None:
    """Version 0.1 pickled NumPy's state as it is, and Python unpickled whatever there was."""
    folder = save(tmp_path, 3)
    state = rng_state()
    if version == "0.1":
        state["numpy"] = np.random.get_state()  # noqa: NPY002
        torch.save(state, folder / "rng_0.pt")
    wanted = drawn()
    model = make_model()
    load_training(folder, model, make_optimizer(model), 0)
    if version == "now":
        set_rng_state(state)
    assert drawn() == wanted


class Exploit:
    """What a stranger may put into a checkpoint."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("file", ["rng_0.pt", "optimizer.pt"])
def test_no_code_in_a_checkpoint_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = save(tmp_path / "run", 3)
    torch.save({"torch": Exploit()}, folder / file)
    monkeypatch.chdir(tmp_path)
    model = make_model()
    with pytest.raises(InputError, match="cannot be resumed from"):
        load_training(folder, model, make_optimizer(model), 0)
    assert not Path("harm").exists()


# What is not whole


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    if how == "no complete.json":
        (folder / "complete.json").unlink()
    elif how == "cut complete.json":
        (folder / "complete.json").write_text('{"model')
    elif how == "complete.json of another kind":
        (folder / "complete.json").write_text("[1]")
    elif how == "longer file":
        file.write_bytes(file.read_bytes() + b"0")
    elif how == "cut file":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing file":
        file.unlink()


DAMAGES = {
    "no complete.json": "complete.json is missing",
    "cut complete.json": "complete.json is damaged",
    "complete.json of another kind": "complete.json is damaged",
    "longer file": "model.safetensors has another size",
    "cut file": "model.safetensors has another size",
    "missing file": "model.safetensors is missing",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_not_whole_is_ignored(tmp_path: Path, how: str) -> None:
    older = save(tmp_path / "checkpoints", 3)
    newer = save(tmp_path / "checkpoints", 6)
    assert latest_checkpoint(tmp_path / "checkpoints") == newer
    damage(newer, how)
    assert latest_checkpoint(tmp_path / "checkpoints") == older == find_checkpoint(tmp_path)
    shutil.rmtree(older)
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    assert DAMAGES[how] in str(incomplete(newer))
    with pytest.raises(InputError, match=f"no complete checkpoint: {DAMAGES[how]}"):
        load_model(newer)
    with pytest.raises(InputError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: no complete checkpoint: no such folder"):
        load_model(tmp_path / "gone")


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_0000004", "step_0000005"]


def test_pruning_keeps_what_is_whole_and_clears_the_rest(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        save(tmp_path, step)
    damage(tmp_path / "step_0000009", "cut file")  # the run goes on from step 6
    (tmp_path / ".tmp-step_0000008").mkdir()  # left by a kill
    written = save(tmp_path, 7, keep=2)
    assert latest_checkpoint(tmp_path) == written
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_0000006", "step_0000007"]


def test_what_changed_without_changing_its_size_is_found_when_every_byte_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 3), save(tmp_path, 6)
    for name in ("model.safetensors", "optimizer.pt", "rng_0.pt", "state.json"):
        file = newer / name
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert incomplete(newer) is None
        assert latest_checkpoint(tmp_path, deep=True) == older
        assert f"{newer} is ignored: {name} is damaged" in caplog.messages[-1]
        data[-1] ^= 1
        file.write_bytes(data)
    assert latest_checkpoint(tmp_path, deep=True) == newer


def test_a_newer_one_never_displaces_the_one_just_written(tmp_path: Path) -> None:
    """The run went on from an earlier one, so the newer one is damaged."""
    save(tmp_path, 9)
    save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000004"]


def test_an_optimizer_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    model = make_model()
    for content in (b"", b"no pickle", b"PK\x03\x04"):
        (folder / "optimizer.pt").write_bytes(content)
        with pytest.raises(InputError, match="cannot be resumed from") as caught:
            load_training(folder, model, make_optimizer(model), 0)
        assert "\n" not in str(caught.value)


def test_a_step_is_saved_again_over_a_damaged_one(tmp_path: Path) -> None:
    damage(save(tmp_path, 3), "cut file")
    assert incomplete(save(tmp_path, 3)) is None


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of the file system is the last one once."""
    old, new = make_model(seed=1), make_model(seed=2)
    calls = last = 0

    def counted(original: Any) -> Any:
        def wrapper(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return original(*arguments, **settings)

        return wrapper

    changes = [
        *[(checkpoint, "save_file"), (torch, "save"), (Path, "write_text"), (Path, "rename")],
        *[(os, "mkdir"), (os, "fsync"), (os, "unlink"), (os, "rmdir")],
    ]
    for step in (3, 6):
        save(tmp_path / "before", step, model=old)
    found = {}
    killed = True
    while killed:
        last += 1
        checkpoints = tmp_path / str(last)
        shutil.copytree(tmp_path / "before", checkpoints)
        with monkeypatch.context() as patch:
            for owner, name in changes:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            calls = 0
            try:
                save(checkpoints, 9, keep=1, model=new)
                killed = False
            except Killed:
                pass
        loaded, state = load_model(checkpoints)
        found[last] = state.step
        assert same_weights(loaded, {6: old, 9: new}[state.step])
        if last % 4 == 0:  # the next save tidies up
            save(checkpoints, 9, keep=1, model=new)
            assert [path.name for path in checkpoints.iterdir()] == ["step_0000009"]
    assert set(found.values()) == {6, 9}
    assert list(found.values()) == sorted(found.values())
    assert last > 20


# What is of another run


def test_weights_of_another_configuration_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    wider = replace(CONFIG, model=replace(CONFIG.model, channels=12))
    with pytest.raises(InputError, match=r"weights do not fit .* another configuration"):
        load_weights(make_model(wider), folder)
    # Edited by hand: sizes are unchanged, so only the weights can tell.
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"channels": 8', '"channels": 9'))
    with pytest.raises(InputError, match="weights do not fit"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = save(tmp_path, 3)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="weights do not fit"):
        load_weights(make_model(), folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "unreadable"), ('{"step": 3}', "lacks `cache_fingerprint`"), ("[]", "state.json")],
)
def test_a_state_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    folder = save(tmp_path, 3)
    (folder / "state.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_state(folder)
