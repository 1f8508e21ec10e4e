"""Runs that start from the weights of an earlier one."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import make_config, same_run
from torch.nn import functional as F

from panoptic_cache.evaluate.export.files import export_model
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.checkpoint import TrainState, save_checkpoint
from panoptic_cache.train.config import LossConfig, ModelConfig, RandomBackbone, TrainConfig
from panoptic_cache.train.loop import train as train_run
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.restore import first_model, load_model, resize_positions

TINY = RandomBackbone(hidden_size=16, layers=3, heads=2, patch_size=7, grid=4)
CONFIG = TrainConfig(model=ModelConfig(backbone="random", random=TINY, taps=(1, 2, 3), channels=8))


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(10 * n + 3, name, n % 2 == 0, n) for n, name in enumerate(names))


KNOWN = named("cat", "sky", "dog", "sea")


def noisy(config: TrainConfig, categories: tuple[Category, ...], seed: int) -> PanopticModel:
    torch.manual_seed(seed)
    model = PanopticModel(config.model, 4 * config.loss.harmonics, len(categories))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four categories whose weights differ from their average."""
    out = tmp_path_factory.mktemp("earlier")
    model = noisy(CONFIG, KNOWN, 0)
    save_checkpoint(
        Ranks(),
        out / "checkpoints",
        TrainState(30, "cache", CONFIG, KNOWN),
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        ema=noisy(CONFIG, KNOWN, 1),
        keep=1,
    )
    return out


def begin(
    init: Path | str, categories: tuple[Category, ...] = KNOWN, **settings: Any
) -> dict[str, torch.Tensor]:
    """The weights that a run begins with, if it would draw them with seed 5."""
    loss = settings.pop("loss", LossConfig())
    model = replace(CONFIG.model, init=str(init), **settings)
    torch.manual_seed(5)
    return first_model(replace(CONFIG, model=model, loss=loss), categories).weights()


def test_the_same_run_again_begins_where_the_average_of_the_first_stood(earlier: Path) -> None:
    wanted = load_model(earlier)[0].weights()
    for path in (earlier, earlier / "checkpoints/step_0000030"):
        found = begin(path)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_export_will_do(earlier: Path, tmp_path: Path) -> None:
    export_model(*load_model(earlier), tmp_path)
    wanted = load_model(earlier)[0].weights()
    assert all(torch.equal(value, wanted[name]) for name, value in begin(tmp_path).items())
    (tmp_path / "state.json").unlink()
    with pytest.raises(
        InputError, match=r"no complete checkpoint: state.json is missing"
    ) as caught:
        begin(tmp_path)
    assert "\n" not in str(caught.value)


def test_rows_of_the_semantic_head_follow_the_names(
    earlier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    categories = named("dog", "cow", "cat", "sun", "rat")
    found, fresh = begin(earlier, categories), begin("", categories)
    theirs = load_model(earlier)[0].weights()
    for kind in ("weight", "bias"):
        name = f"semantic_head.{kind}"
        assert len(found[name]) == 5
        for row, source in enumerate((2, None, 0, None, None)):
            wanted = theirs[name][source] if source is not None else fresh[name][row]
            assert torch.equal(found[name][row], wanted)
    others = [name for name in found if not name.startswith("semantic_head")]
    assert all(torch.equal(found[name], theirs[name]) for name in others)
    said = caplog.text
    assert "weights of" in said
    assert "step 30" in said
    assert "2 categories come in: dog, cat\n" in said
    assert "3 categories are new: cow, sun, rat\n" in said
    assert "2 categories are dropped: sky, sea\n" in said


def test_another_code_has_an_instance_head_of_its_own(earlier: Path) -> None:
    theirs = load_model(earlier)[0].weights()
    for loss in (LossConfig(encoding="direct"), LossConfig(harmonics=3)):
        found, fresh = begin(earlier, loss=loss), begin("", loss=loss)
        for name, value in found.items():
            source = fresh if name.startswith("instance_head") else theirs
            assert torch.equal(value, source[name]), name


def test_another_decoder_starts_anew_and_its_heads_with_it(
    earlier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    theirs, found = load_model(earlier)[0].weights(), begin(earlier, channels=12)
    fresh = begin("", channels=12)
    for name, value in found.items():
        source = theirs if name.startswith("encoder") else fresh
        assert torch.equal(value, source[name]), name
    assert caplog.text.count("is new: the decoder has another width") == 2


def test_fewer_blocks_and_other_taps_will_do(earlier: Path) -> None:
    theirs, found = load_model(earlier)[0].weights(), begin(earlier, taps=(1, 2))
    assert not any("blocks.2" in name for name in found)
    assert torch.equal(found["encoder.norm.weight"], theirs["encoder.norm.weight"])
    assert torch.equal(found["decoder.layers.3.weight"], theirs["decoder.layers.3.weight"])
    assert found["decoder.layers.0.weight"].shape[0] == 32


def test_position_embeddings_are_resized(earlier: Path) -> None:
    theirs = load_model(earlier)[0].weights()["encoder.pos_embed"]
    found = begin(earlier, random=replace(TINY, grid=6))["encoder.pos_embed"]
    assert found.shape == (1, 37, 16)
    assert torch.equal(found[:, 0], theirs[:, 0])
    assert torch.allclose(resize_positions(theirs, 4), theirs, atol=1e-6)
    # What is linear in x and y stays so, away from the edges.
    places = (torch.arange(8) + 0.5) / 8
    plane = torch.stack([places.expand(8, 8), places[:, None].expand(8, 8)], -1)
    ramp = torch.cat([torch.zeros(1, 1, 2), plane.reshape(1, 64, 2)], 1)
    large = resize_positions(ramp, 16)[0, 1:].reshape(16, 16, 2)[6:10, 6:10]
    wanted = (torch.arange(16) + 0.5)[6:10] / 16
    torch.testing.assert_close(large[..., 0], wanted.expand(4, 4))
    torch.testing.assert_close(large[..., 1], wanted[:, None].expand(4, 4))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"random": replace(TINY, hidden_size=32)}, "hidden_size is 16, here 32"),
        ({"random": replace(TINY, heads=4)}, "num_attention_heads is 2, here 4"),
        ({"random": replace(TINY, patch_size=14)}, "patch_size is 7, here 14"),
        (
            {"random": replace(TINY, layers=4), "taps": (1, 4)},
            "it has 3 blocks, model.taps ask for 4",
        ),
        ({"backbone": "facebook/dinov2-small"}, "hidden_size is 16, here 384"),
    ],
)
def test_another_backbone_is_refused(earlier: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        begin(earlier, **settings)
    assert f"its backbone is another: {reason} (give model.backbone" in str(caught.value)
    assert str(caught.value).startswith(f"model.init = {earlier}")


def test_no_category_in_common_is_a_line(earlier: Path) -> None:
    others = named("a", "b")
    with pytest.raises(InputError, match=r"no category in common: it knows cat, .* run a, b"):
        begin(earlier, others)
    theirs = load_model(earlier)[0].weights()
    found, fresh = begin(earlier, others, init_heads=False), begin("", others)
    for name, value in found.items():
        assert torch.equal(value, (fresh if "head" in name else theirs)[name]), name


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_read_it_again(tiny_cache: Path, tmp_path: Path) -> None:
    train_run(make_config(tiny_cache, tmp_path / "first", steps=2))
    config = make_config(tiny_cache, tmp_path / "second", steps=4)
    config = replace(config, model=replace(config.model, init=str(tmp_path / "first")))
    train_run(config)
    shutil.copytree(tmp_path / "second", tmp_path / "third")
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "third/checkpoints/step_0000004")
    train_run(replace(config, out=str(tmp_path / "third")), resume=True)
    assert same_run(tmp_path / "second", tmp_path / "third")


def test_the_resized_embeddings_mean_the_same_places(earlier: Path) -> None:
    """A network of a larger grid sees a larger photo as the first one saw it."""
    small, _ = load_model(earlier)
    grown = begin(earlier, random=replace(TINY, grid=8))["encoder.pos_embed"]
    ours = small.weights()["encoder.pos_embed"][:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(grown[:, 1:].reshape(1, 8, 8, 16).permute(0, 3, 1, 2), 2)
    assert (mean - ours).abs().mean() < 0.2 * ours.abs().mean()
