"""Several views of one photo: their average and their cost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run

from panoptic_cache.evaluate.predict import Heads, Predictor, average
from panoptic_cache.pipeline.base.errors import InputError


def test_flipping_makes_the_prediction_equivariant(trained: Path) -> None:
    predictor = Predictor(trained, "cpu", flip=True)
    photo = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    (one,) = predictor.heads([photo])
    (two,) = predictor.heads([np.ascontiguousarray(photo[:, ::-1])])
    turned = predictor.encoding.mirrored(two.instance.flip(-1))
    assert torch.allclose(one.instance, turned, atol=1e-5)
    assert torch.allclose(one.semantic, two.semantic.flip(-1), atol=1e-4)
    (plain,) = Predictor(trained, "cpu").heads([photo])
    assert not torch.allclose(one.instance, plain.instance, atol=1e-3)


def test_average_is_of_codes_and_probabilities() -> None:
    one = Heads(torch.zeros(2, 4, 6), torch.tensor([0.0, 0.0])[:, None, None].expand(2, 4, 6))
    half = torch.tensor([0.75, 0.25]).log()[:, None, None].expand(2, 2, 3)
    two = Heads(torch.ones(2, 2, 3), half + 5)
    both = average([two, one])
    assert both.instance.shape == (2, 4, 6)
    assert torch.allclose(both.instance, torch.full((2, 4, 6), 0.5))
    chance = torch.tensor([0.625, 0.375])[:, None, None].expand(2, 4, 6)
    assert torch.allclose(both.semantic.softmax(0), chance)
    assert average([one]) is one
    certain = Heads(torch.ones(2, 1, 1), torch.tensor([500.0, -500.0])[:, None, None])
    assert bool(average([certain, certain]).semantic.isfinite().all()), "no log of zero"


def test_sizes_average_and_cost(trained: Path) -> None:
    predictor = Predictor(trained, "cpu", sizes=(56, 84))
    assert predictor.cost == 1 + 2.25
    assert Predictor(trained, "cpu", flip=True).cost == 2
    photo = np.zeros((30, 50, 3), np.uint8)
    (heads,) = predictor.heads([photo])
    assert max(heads.instance.shape[-2:]) == 84
    assert predictor([photo])[0].ids.shape == (30, 50)
    with pytest.raises(InputError, match="no multiple of the patch size 7"):
        Predictor(trained, "cpu", sizes=(60,))


def test_the_options_of_the_command_line(
    run: Run, trained: Path, tiny_root: Path, tmp_path: Path
) -> None:
    photo = next((tiny_root / "val").iterdir())
    arguments = ("predict", photo, "--checkpoint", trained, "--out", tmp_path, "--device", "cpu")
    code, out, _ = run(*arguments, "--flip", "--sizes", "56,84", "--json")
    assert (code, json.loads(out)["pictures"]) == (0, 1)
    assert run(*arguments, "--sizes", "56;84")[0] == 2
    code, _, err = run(*arguments, "--sizes", "60")
    assert code == 1
    assert "56 is" in err or "63 is" in err
