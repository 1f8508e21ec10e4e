"""The losses against their formulas, written as loops over pixels in float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from panoptic_cache.train.augment import PADDING
from panoptic_cache.train.config import LossConfig
from panoptic_cache.train.data import Batch
from panoptic_cache.train.encoding import (
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
    cell_centres,
    make_encoding,
)
from panoptic_cache.train.losses import (
    Distance,
    dice,
    eds_weight,
    instance_loss,
    safe_sqrt,
    semantic_loss,
)

HEIGHT, WIDTH, CLASSES = 5, 6, 4
LABELLED, UNLABELLED, CROWD = 0, 1, 2
Reduction = Literal["mean", "sum"]
ENCODINGS = ("positional", "direct", "classification")


def make_batch(images: int = 2, seed: int = 0) -> Batch:
    """Rows 1 and 2 are things, 3 stuff, 4 crowd; some pixels are unlabelled, some padding.

    The second image has no instance, the third no padding.
    """
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 5, (images, HEIGHT, WIDTH), generator=random, dtype=torch.uint8)
    instance = torch.tensor([[False, True, True, False, False]]).repeat(images, 1)
    if images > 1:
        index[1] = torch.where((index[1] == 1) | (index[1] == 2), 3, index[1])
        instance[1] = False
    void = torch.where(index == 0, UNLABELLED, torch.where(index == 4, CROWD, LABELLED))
    padding = torch.zeros(images, HEIGHT, WIDTH, dtype=torch.bool)
    padding[:2, -1] = True
    padding[:2, :, 0] = True
    eds = torch.randint(0, 120, index.shape, generator=random, dtype=torch.uint8)
    eds[:, 0, 1] = 255
    return Batch(
        keys=tuple(str(image) for image in range(images)),
        photo=torch.zeros(images, 3, HEIGHT, WIDTH, dtype=torch.uint8),
        segment_map=torch.where(padding, 0, index).to(torch.uint8),
        eds=torch.where(padding, 255, eds).to(torch.uint8),
        void=torch.where(padding, PADDING, void).to(torch.uint8),
        eds_scale=torch.rand(images, generator=random) + 0.5,
        colour=torch.ones(images, 3),
        centroid=torch.rand(images, 5, 2, generator=random) * 2 - 1,
        instance=instance,
        label=torch.tensor([[-1, 0, 1, 3, 0]]).repeat(images, 1),
    )


def rows_of(batch: Batch, keep: slice) -> Batch:
    values = {field.name: getattr(batch, field.name)[keep] for field in fields(Batch)}
    return Batch(**values)


def random_prediction(batch: Batch, channels: int, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(len(batch.keys), channels, HEIGHT, WIDTH, generator=random)


def pixels() -> list[tuple[int, int]]:
    return [(y, x) for y in range(HEIGHT) for x in range(WIDTH)]


def gamma_by_hand(p: float, harmonics: int) -> list[float]:
    waves = (math.sin, math.cos)
    return [wave(2**k * math.pi * p) for k in range(harmonics) for wave in waves]


def weight_by_hand(batch: Batch, image: int, y: int, x: int, config: LossConfig) -> float:
    if not config.eds:
        return 1.0
    code = int(batch.eds[image, y, x])
    if code == 255:
        return config.w_min
    distance = code * 0.5 * float(batch.eds_scale[image])
    return config.w_min + (1 - config.w_min) * math.exp(-((distance / config.d) ** 2))


def reduce_by_hand(per_image: list[list[tuple[float, float]]], config: LossConfig) -> float:
    """Means over images of (loss, weight) pairs."""
    values = []
    for pairs in per_image:
        total, weight = sum(a * w for a, w in pairs), sum(w for _, w in pairs)
        if config.reduction == "mean":
            total = total / weight if weight > 0 else 0.0
        values.append(total)
    return sum(values) / len(values)


def instance_weight_by_hand(batch: Batch, image: int, y: int, x: int, config: LossConfig) -> float:
    void = int(batch.void[image, y, x])
    if void in {CROWD, PADDING} or (void == UNLABELLED and not config.include_void):
        return 0.0
    return weight_by_hand(batch, image, y, x, config)


def parts(code: list[float], encoding: Encoding) -> list[list[float]]:
    """What one Euclidean distance each is taken of: u and v, or all of a colour."""
    if isinstance(encoding, PositionalCode):
        half = len(code) // 2
        return [code[:half], code[half:]]
    return [code]


def target_by_hand(batch: Batch, image: int, y: int, x: int, encoding: Encoding) -> list[float]:
    row = int(batch.segment_map[image, y, x])
    if not batch.instance[image, row]:
        return [0.0] * encoding.channels
    u, v = batch.centroid[image, row].tolist()
    if isinstance(encoding, PositionalCode):
        return gamma_by_hand(u, encoding.harmonics) + gamma_by_hand(v, encoding.harmonics)
    return [(u + 1) / 2, (v + 1) / 2, 1.0]


def log_softmax_by_hand(logits: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, logits)))
    return [x - total for x in logits]


def instance_pixel_by_hand(
    prediction: Tensor, batch: Batch, encoding: Encoding, config: LossConfig, distance: Distance
) -> float:
    per_image = []
    for image in range(len(batch.keys)):
        pairs = []
        for y, x in pixels():
            code = prediction[image, :, y, x].tolist()
            if isinstance(encoding, ClassificationCode):
                row = int(batch.segment_map[image, y, x])
                classes = [encoding.cells] * 2
                if batch.instance[image, row]:
                    u, v = batch.centroid[image, row].tolist()
                    classes = [int((p + 1) / 2 * encoding.cells) for p in (u, v)]
                half = encoding.cells + 1
                loss = -sum(
                    log_softmax_by_hand(code[axis * half : (axis + 1) * half])[classes[axis]] / 2
                    for axis in range(2)
                )
            else:
                target = target_by_hand(batch, image, y, x, encoding)
                lengths = [
                    math.dist(a, b)
                    for a, b in zip(parts(code, encoding), parts(target, encoding), strict=True)
                ]
                power = 2 if distance == "squared" else 1
                loss = sum(length**power for length in lengths) / len(lengths)
            pairs.append((loss, instance_weight_by_hand(batch, image, y, x, config)))
        per_image.append(pairs)
    return reduce_by_hand(per_image, config)


def variation_by_hand(batch: Batch, neighbours: Any) -> float:
    """Mean over each image's pixels of `neighbours(image, (y, x), (above or left))`."""
    values = []
    for image in range(len(batch.keys)):
        inside = {p for p in pixels() if int(batch.void[image][p]) != PADDING}
        total = 0.0
        for y, x in sorted(inside):
            total += sum(
                neighbours(image, near, (y, x))
                for near in ((y - 1, x), (y, x - 1))
                if near in inside
            )
        values.append(total / len(inside))
    return sum(values) / len(values)


def code_variation_by_hand(prediction: Tensor, batch: Batch, encoding: Encoding) -> float:
    def apart(image: int, one: tuple[int, int], other: tuple[int, int]) -> float:
        a, b = (parts(prediction[image, :, y, x].tolist(), encoding) for y, x in (one, other))
        return sum(math.dist(p, q) for p, q in zip(a, b, strict=True)) / len(a)

    return variation_by_hand(batch, apart)


def class_variation_by_hand(groups: list[Tensor], batch: Batch) -> float:
    """The mean of the groups' variations; a group is one distribution a pixel."""

    def one_group(logits: Tensor) -> float:
        def cross_entropy(image: int, one: tuple[int, int], other: tuple[int, int]) -> float:
            a, b = (log_softmax_by_hand(logits[image, :, y, x].tolist()) for y, x in (one, other))
            return -sum(math.exp(p) * q for p, q in zip(a, b, strict=True)) / 2

        return variation_by_hand(batch, cross_entropy)

    return sum(map(one_group, groups)) / len(groups)


def dice_by_hand(prediction: Tensor, batch: Batch, encoding: PositionalCode) -> float:
    values = []
    for image in range(len(batch.keys)):
        above = below = 0.0
        counted = [p for p in pixels() if int(batch.void[image][p]) not in {CROWD, PADDING}]
        rows = [row for row in range(5) if batch.instance[image, row]]
        for row in rows:
            area = sum(int(batch.segment_map[image][p]) == row for p in counted)
            for y, x in counted:
                u, v = batch.centroid[image, row].tolist()
                code = prediction[image, :, y, x].tolist()
                dx = math.dist(code[:8], gamma_by_hand(u, 4))
                dy = math.dist(code[8:], gamma_by_hand(v, 4))
                p = math.exp(-(dx**2)) * math.exp(-(dy**2))
                r = float(int(batch.segment_map[image, y, x]) == row)
                above += r * p / area
                below += (r + p) / area
        values.append(1 - 2 * above / below if rows else 0.0)
    return sum(values) / len(values)


CONFIGS = [
    LossConfig(),
    LossConfig(d=7.0, w_min=0.25),
    LossConfig(eds=False),
    LossConfig(include_void=False),
    LossConfig(reduction="sum"),
    LossConfig(eds=False, reduction="sum", include_void=False, tv=0.7, dice=0.3),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_eds_weights_follow_the_formula(config: LossConfig) -> None:
    batch = make_batch(3)
    weight = eds_weight(batch, config)
    for image in range(3):
        for y, x in pixels():
            wanted = weight_by_hand(batch, image, y, x, config)
            assert weight[image, y, x].item() == pytest.approx(wanted, rel=1e-5, abs=1e-12)


def test_eds_weight_of_the_paper() -> None:
    batch = make_batch(1)
    batch = replace(batch, eds=torch.full_like(batch.eds, 40), eds_scale=torch.ones(1))
    assert eds_weight(batch, LossConfig())[0, 0, 0].item() == pytest.approx(math.exp(-1))
    assert eds_weight(batch, LossConfig(w_min=0.1))[0, 0, 0].item() == pytest.approx(
        0.1 + 0.9 * math.exp(-1)
    )
    far = replace(batch, eds=torch.full_like(batch.eds, 255), eds_scale=torch.full((1,), 0.01))
    assert eds_weight(far, LossConfig(w_min=0.1)).unique().tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("distance", ["norm", "squared"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_instance_losses_follow_the_formulas(
    name: str, config: LossConfig, distance: Distance
) -> None:
    encoding = make_encoding(name, 4)
    batch = make_batch(3)
    prediction = random_prediction(batch, encoding.channels)
    found = instance_loss(prediction, batch, encoding, config, distance)
    pixel = instance_pixel_by_hand(prediction, batch, encoding, config, distance)
    if isinstance(encoding, ClassificationCode):
        tv = class_variation_by_hand(list(prediction.split(encoding.cells + 1, dim=1)), batch)
    else:
        tv = code_variation_by_hand(prediction, batch, encoding)
    overlap = 0.0
    if isinstance(encoding, PositionalCode):
        overlap = dice_by_hand(prediction, batch, encoding)
    assert found.pixel.item() == pytest.approx(pixel, rel=1e-5)
    assert found.tv.item() == pytest.approx(tv, rel=1e-5)
    assert found.dice.item() == pytest.approx(overlap, rel=1e-5)
    total = pixel + config.tv * tv + config.dice * overlap
    assert found.total.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("factors", [None, [0.5, 3.0, 0.0, 1.0]])
@pytest.mark.parametrize("config", CONFIGS)
def test_semantic_losses_follow_the_formulas(
    config: LossConfig, factors: list[float] | None
) -> None:
    batch = make_batch(3)
    logits = random_prediction(batch, CLASSES)
    by_class = torch.tensor(factors) if factors else None
    found = semantic_loss(logits, batch, config, by_class)
    per_image = []
    for image in range(3):
        pairs = []
        for y, x in pixels():
            label = int(batch.label[image, int(batch.segment_map[image, y, x])])
            if label >= 0:  # crowd keeps its category; unlabelled and padding have none
                loss = -log_softmax_by_hand(logits[image, :, y, x].tolist())[label]
                loss *= factors[label] if factors else 1
                pairs.append((loss, weight_by_hand(batch, image, y, x, config)))
        per_image.append(pairs)
    pixel, tv = reduce_by_hand(per_image, config), class_variation_by_hand([logits], batch)
    assert found.pixel.item() == pytest.approx(pixel, rel=1e-5)
    assert found.tv.item() == pytest.approx(tv, rel=1e-5)
    assert found.dice.item() == 0
    assert found.total.item() == pytest.approx(pixel + config.tv * tv, rel=1e-5)


def gradient(prediction: Tensor, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, prediction)
    return found


@pytest.mark.parametrize("include_void", [True, False])
@pytest.mark.parametrize("name", ENCODINGS)
def test_excluded_pixels_get_no_gradient(name: str, include_void: bool) -> None:
    encoding = make_encoding(name, 4)
    batch = make_batch(2)
    prediction = random_prediction(batch, encoding.channels).requires_grad_()
    excluded = {CROWD, PADDING} | (set() if include_void else {UNLABELLED})
    config = LossConfig(tv=0, dice=0, eds=False, include_void=include_void)
    touched = touched_pixels(prediction, batch, encoding, config)
    for value in (LABELLED, UNLABELLED, CROWD, PADDING):
        where = batch.void == value
        assert not touched[where].any() if value in excluded else touched[where].all()
    # DICE reads unlabelled pixels whatever the pixel loss does with them.
    touched = touched_pixels(prediction, batch, encoding, replace(config, dice=1))
    assert not touched[(batch.void == CROWD) | (batch.void == PADDING)].any()


def touched_pixels(
    prediction: Tensor, batch: Batch, encoding: Encoding, config: LossConfig
) -> Tensor:
    loss = instance_loss(prediction, batch, encoding, config, "norm").total
    return gradient(prediction, loss).abs().sum(1) > 0


def test_padding_gets_no_gradient_from_any_term() -> None:
    batch = make_batch(2)
    padding = batch.void == PADDING
    for name in ENCODINGS:
        encoding = make_encoding(name, 4)
        prediction = random_prediction(batch, encoding.channels).requires_grad_()
        loss = instance_loss(prediction, batch, encoding, LossConfig(tv=1), "norm").total
        assert gradient(prediction, loss).movedim(1, -1)[padding].abs().max() == 0
    logits = random_prediction(batch, CLASSES).requires_grad_()
    loss = semantic_loss(logits, batch, LossConfig(tv=1)).total
    assert gradient(logits, loss).movedim(1, -1)[padding].abs().max() == 0


@pytest.mark.parametrize("name", [*ENCODINGS, "semantic"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_is_the_mean_of_its_halves(name: str, reduction: Reduction) -> None:
    batch = make_batch(4)
    config = LossConfig(reduction=reduction)
    channels = CLASSES if name == "semantic" else make_encoding(name, 4).channels
    prediction = random_prediction(batch, channels)

    def losses(keep: slice) -> list[Tensor]:
        part = rows_of(batch, keep)
        if name == "semantic":
            found = semantic_loss(prediction[keep], part, config)
        else:
            found = instance_loss(prediction[keep], part, make_encoding(name, 4), config, "norm")
        return [found.total, found.pixel, found.tv, found.dice]

    both = zip(losses(slice(0, 2)), losses(slice(2, 4)), strict=True)
    for whole, (one, other) in zip(losses(slice(0, 4)), both, strict=True):
        torch.testing.assert_close(whole, (one + other) / 2)


@pytest.mark.parametrize("distance", ["norm", "squared"])
@pytest.mark.parametrize("encoding", [PositionalCode(4), DirectCode()])
def test_a_perfect_prediction_has_finite_gradients(encoding: Encoding, distance: Distance) -> None:
    batch = make_batch(2)
    codes = encoding.encode(batch.centroid, batch.instance)
    index = batch.segment_map.long()
    perfect = torch.stack([codes[image][index[image]] for image in range(2)]).movedim(-1, 1)
    prediction = perfect.clone().requires_grad_()
    found = instance_loss(prediction, batch, encoding, LossConfig(), distance)
    assert found.pixel == 0
    assert gradient(prediction, found.total).isfinite().all()


def test_flat_predictions_have_no_variation_and_finite_gradients() -> None:
    batch = make_batch(2)
    for encoding in (PositionalCode(4), DirectCode()):
        prediction = torch.ones(2, encoding.channels, HEIGHT, WIDTH, requires_grad=True)
        found = instance_loss(prediction, batch, encoding, LossConfig(), "norm")
        assert found.tv == 0
        assert gradient(prediction, found.total).isfinite().all()


def test_safe_sqrt_has_the_subgradient_zero() -> None:
    x = torch.tensor([0.0, 4.0, 1e-38], requires_grad=True)
    y = safe_sqrt(x)
    assert y.tolist() == pytest.approx([0.0, 2.0, 1e-19])
    assert gradient(x, y[:2].sum()).tolist() == [0.0, 0.25, 0.0]


def test_dice_of_a_true_and_of_a_void_prediction() -> None:
    encoding = PositionalCode(4)
    batch = make_batch(1)
    batch = replace(
        batch,
        centroid=torch.stack([cell_centres(80)[[5, 20, 40, 60, 70]]] * 2, dim=-1)[None],
        instance=torch.tensor([[False, True, True, True, False]]),
    )
    codes = encoding.encode(batch.centroid, batch.instance)[0]
    true = codes[batch.segment_map[0].long()].movedim(-1, 0)[None]
    assert dice(true, batch, encoding).item() == pytest.approx(0, abs=0.01)
    assert dice(torch.zeros_like(true), batch, encoding).item() == pytest.approx(1, abs=0.01)


def test_an_image_without_instances_has_no_dice() -> None:
    encoding = PositionalCode(4)
    batch = rows_of(make_batch(2), slice(1, 2))
    prediction = random_prediction(batch, 16).requires_grad_()
    loss = dice(prediction, batch, encoding)
    assert loss == 0
    assert gradient(prediction, loss).abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_image_without_weight_adds_nothing(reduction: Reduction) -> None:
    batch = make_batch(1)
    batch = replace(batch, eds=torch.full_like(batch.eds, 255))
    config = LossConfig(tv=0, dice=0, reduction=reduction)
    prediction = random_prediction(batch, 16).requires_grad_()
    loss = instance_loss(prediction, batch, PositionalCode(4), config, "norm").total
    assert loss == 0
    assert gradient(prediction, loss).abs().max() == 0
    logits = random_prediction(batch, CLASSES)
    assert semantic_loss(logits, batch, config).total == 0


@pytest.mark.parametrize("name", ENCODINGS)
def test_half_precision_predictions_are_counted_in_single(name: str) -> None:
    encoding = make_encoding(name, 4)
    batch = make_batch(2)
    prediction = random_prediction(batch, encoding.channels).bfloat16()
    found = instance_loss(prediction, batch, encoding, LossConfig(), "norm")
    single = instance_loss(prediction.float(), batch, encoding, LossConfig(), "norm")
    assert found.total.dtype == torch.float32
    assert found.total == single.total


def test_wide_index_maps_give_the_same_losses() -> None:
    batch = make_batch(2)
    wide = replace(batch, segment_map=batch.segment_map.int())
    prediction = random_prediction(batch, 16)
    one, other = (
        instance_loss(prediction, each, PositionalCode(4), LossConfig(), "norm")
        for each in (batch, wide)
    )
    assert one.total == other.total
    one, other = (
        semantic_loss(prediction[:, :CLASSES], each, LossConfig()) for each in (batch, wide)
    )
    assert one.total == other.total
