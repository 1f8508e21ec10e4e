"""The ceiling: what the ground truth scores after encoding, corruption and decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from panoptic_cache.evaluate.metric.score import Scores
from panoptic_cache.evaluate.study.comparison import ceiling
from panoptic_cache.evaluate.study.corruption import (
    LOGIT,
    Corruption,
    corrupt,
    corrupt_logits,
    corrupted_heads,
    drift_over,
    measure_quality,
    perfect_heads,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.train.encoding import (
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
)


def scored(dataset: CocoPanoptic, **errors: Any) -> Scores:
    return ceiling(dataset, Corruption(**errors))[0]


def test_level_0_changes_nothing_and_seeds_decide() -> None:
    code = torch.randn(16, 40, 50)
    assert corrupt(code, 0, torch.Generator()) is code
    one, again, other = (
        corrupt(code, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_corruption_is_as_strong_as_it_says() -> None:
    noise = corrupt(torch.zeros(16, 200, 200), 2, torch.Generator().manual_seed(0))
    neighbours = (noise[:, :, 1:] - noise[:, :, :-1]).std() / 2**0.5
    assert neighbours == pytest.approx(0.2, rel=0.1)  # white, mostly
    coarse = torch.nn.functional.avg_pool2d(noise, 4)
    assert 0.15 < coarse.std() < 0.3
    edge = torch.zeros(1, 41, 41)
    edge[..., 20:] = 1
    blurred = torch.stack(
        [corrupt(edge, 2, torch.Generator().manual_seed(seed))[0] for seed in range(40)]
    ).mean((0, 1))
    # One sigma beyond an edge, a Gaussian blur leaves 16 percent.
    assert blurred[18].item() == pytest.approx(0.23, abs=0.05)
    assert blurred[20].item() == pytest.approx(0.60, abs=0.05)


def test_corrupted_logits_lose_more_with_each_level() -> None:
    labels = torch.zeros(96, 96, dtype=torch.int64)
    labels[:, 40:], labels[60:, 20:70] = 1, 2
    logits = LOGIT * torch.nn.functional.one_hot(labels, 20).permute(2, 0, 1).float()
    assert corrupt_logits(logits, 0, torch.Generator()) is logits
    right = []
    for level in (1, 2, 3):
        one, again, other = (
            corrupt_logits(logits, level, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        right.append((one.argmax(0) == labels).float().mean().item())
    assert 0.97 < right[0] < 1
    assert right[0] > right[1] > right[2] > 0.4


def test_noise_of_one_head_leaves_the_other_alone(tiny_dataset: CocoPanoptic) -> None:
    few = tiny_dataset.spread(2)
    for clean, spoiled in zip(
        corrupted_heads(few, Corruption(56, noise=1, seed=3)),
        corrupted_heads(few, Corruption(56, noise=1, semantic_noise=2, seed=3)),
        strict=True,
    ):
        assert torch.equal(clean.instance, spoiled.instance)
        assert not torch.equal(clean.semantic, spoiled.semantic)
    first, second = (
        next(corrupted_heads(few, Corruption(56, level, semantic_noise=2, seed=3))).semantic
        for level in (0, 1)
    )
    assert torch.equal(first, second)
    spoiled_pq = scored(few, size=112, semantic_noise=3).pq.all
    clean_pq = scored(few, size=112).pq.all
    assert spoiled_pq is not None
    assert clean_pq is not None
    assert spoiled_pq.pq < clean_pq.pq


def test_drift_slides_centroids_over_an_instance_and_stays_on_the_curve() -> None:
    mask = np.zeros((60, 80), np.bool_)
    mask[10:50, 20:70] = True
    slide = drift_over(mask, 4, torch.Generator().manual_seed(0))  # (2000, 2)
    assert slide.mean(0).abs().max() < 1e-6
    assert slide.norm(dim=1).max().item() == pytest.approx(4 / 80)  # 2 cells of 2 / 80
    field = slide.T.view(2, 40, 50)
    assert (field[:, 1:] - field[:, :-1]).abs().max() < 0.01


def test_drifting_heads_differ_in_their_codes_alone(tiny_dataset: CocoPanoptic) -> None:
    record = tiny_dataset.records[0]
    ids, encoding = read_ids(record.png), PositionalCode()
    generator = torch.Generator().manual_seed(0)
    plain, logits = perfect_heads(record, ids, tiny_dataset.categories, encoding, 64)
    code, same = perfect_heads(
        record, ids, tiny_dataset.categories, encoding, 64, drift=4, generator=generator
    )
    assert torch.equal(logits, same)
    assert not torch.equal(plain, code)
    assert torch.allclose(plain.square().sum(0), code.square().sum(0), atol=1e-4)
    drifted = scored(tiny_dataset.spread(4), size=160, drift=2).pq.all
    assert drifted is not None
    assert drifted.pq > 0.85


def test_what_is_measured_tells_noise_from_drift(tiny_dataset: CocoPanoptic) -> None:
    found = []
    for corruption in (Corruption(112), Corruption(112, drift=6), Corruption(112, noise=1)):
        image = next(corrupted_heads(tiny_dataset, corruption))
        quality = measure_quality(image, tiny_dataset.categories)
        assert quality is not None
        found.append(quality)
    clean, drifting, noisy = found
    assert clean.noise < 0.001
    assert drifting.noise < 0.001
    assert noisy.noise > 0.01
    assert clean.drift < 0.5 * drifting.drift
    nothing = replace(image, semantic=torch.zeros_like(image.semantic))
    nothing.semantic[-1] = 1  # stuff everywhere
    assert measure_quality(nothing, tiny_dataset.categories) is None


@pytest.mark.parametrize("encoding", [PositionalCode(2), DirectCode(), ClassificationCode()])
def test_the_ceiling_of_other_codes(tiny_dataset: CocoPanoptic, encoding: Encoding) -> None:
    outcome, quality = ceiling(tiny_dataset.spread(4), Corruption(112), encoding=encoding)
    assert outcome.pq.all is not None
    assert outcome.pq.all.pq > 0.8
    assert quality is not None


def test_perfect_heads_say_the_truth(tiny_dataset: CocoPanoptic) -> None:
    record = tiny_dataset.records[0]
    ids = read_ids(record.png)
    code, logits = perfect_heads(record, ids, tiny_dataset.categories, PositionalCode(), 64)
    assert code.shape == (16, 64, 64)
    assert logits.shape == (len(tiny_dataset.categories), 64, 64)
    length = code.square().sum(0)
    assert set(length.round().unique().tolist()) <= {0.0, 8.0}
    isthing = torch.tensor([category.isthing for category in tiny_dataset.categories])
    assert isthing[logits.argmax(0)][length > 1].all()


@pytest.mark.slow
def test_made_up_scenes_score_high_and_noise_costs(tiny_dataset: CocoPanoptic) -> None:
    clean = scored(tiny_dataset, size=160)
    noisy = scored(tiny_dataset, size=160, noise=3)
    assert clean.pq.all is not None
    assert noisy.pq.all is not None
    assert clean.pq.all.pq > 0.9
    assert 0.4 < noisy.pq.all.pq < clean.pq.all.pq
    assert noisy.pq == scored(tiny_dataset, size=160, noise=3).pq
    found = clean.to_json()
    assert found["images"] == 12
    assert set(found["seconds_per_image"]) == {"encode", "decode", "score"}
    plain = replace(clean, seconds_per_image={}).to_json()
    assert set(found) == {*plain, "images", "seconds_per_image"}
    assert {"All", "Things", "Stuff", "per_class", "sizes", "mask_ap"} < set(found)


def test_an_empty_split_is_an_error(tiny_dataset: CocoPanoptic) -> None:
    with pytest.raises(InputError, match="no images"):
        scored(replace(tiny_dataset, records=()))


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "least"), [(0, 96.8), (1, 94.5), (2, 92.0), (3, 87.0)])
def test_real_images_reach_what_was_measured(coco_sample: Path, noise: float, least: float) -> None:
    result = scored(read_dataset(CocoLayout.of(coco_sample, "val2017")), noise=noise)
    assert result.pq.all is not None
    assert 100 * result.pq.all.pq > least
