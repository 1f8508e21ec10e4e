"""The strip-wise losses of distributions against maps at full size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.train import class_losses as module
from panoptic_cache.train.class_losses import PixelTerms, class_losses


def make_terms(maps: int, classes: int, height: int, width: int) -> PixelTerms:
    return PixelTerms(
        torch.randint(0, classes, (maps, height, width)),
        torch.rand(maps, height, width),
        torch.rand(maps, height - 1, width),
        torch.rand(maps, height, width - 1),
    )


def literal(logits: Tensor, terms: PixelTerms) -> tuple[Tensor, Tensor]:
    """Both terms, in float64, from full-size maps."""
    size = terms.target.shape[1:]
    full = F.interpolate(logits.double(), size, mode="bilinear", align_corners=False)
    log_p = full.log_softmax(1)
    p = log_p.exp()
    pixel = (F.cross_entropy(full, terms.target, reduction="none") * terms.weight).sum()
    down = -(p[:, :, :-1] * log_p[:, :, 1:]).sum(1)
    right = -(p[..., :-1] * log_p[..., 1:]).sum(1)
    return pixel, (down * terms.down).sum() + (right * terms.right).sum()


# Maps, classes, the decoder's size, the input's; growing, equal, shrinking, a single pixel.
SHAPES = [
    (2, 5, (6, 7), (11, 13)),
    (3, 4, (8, 8), (8, 8)),
    (2, 4, (16, 16), (10, 9)),
    (2, 133, (24, 24), (42, 42)),
    (1, 3, (1, 1), (4, 4)),
    (2, 3, (4, 4), (1, 1)),
]


@pytest.mark.parametrize("budget", [1, 3_000, 1 << 24], ids=["a row", "some rows", "many maps"])
@pytest.mark.parametrize(("maps", "classes", "coarse", "full"), SHAPES)
def test_strips_are_the_whole(
    maps: int,
    classes: int,
    coarse: tuple[int, int],
    full: tuple[int, int],
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.STRIP_BYTES, "cpu", budget)
    torch.manual_seed(0)
    logits = (3 * torch.randn(maps, classes, *coarse)).requires_grad_()
    terms = make_terms(maps, classes, *full)
    total, pixel, variation = class_losses(logits, terms)
    wanted = literal(logits, terms)
    torch.testing.assert_close((pixel, variation), tuple(w.float() for w in wanted))
    (found,) = torch.autograd.grad(2 * total, logits)
    (slope,) = torch.autograd.grad(2 * sum(wanted, start=torch.tensor(0.0)), logits)
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


def test_half_precision_is_counted_in_single() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 5, 5).bfloat16().requires_grad_()
    terms = make_terms(1, 4, 9, 9)
    total, *_ = class_losses(logits, terms)
    same, *_ = class_losses(logits.detach().float(), terms)
    assert total.dtype == torch.float32
    assert torch.equal(total.detach(), same)
    total.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_without_gradients_none_is_computed() -> None:
    terms = make_terms(1, 4, 9, 9)
    logits = torch.randn(1, 4, 5, 5, requires_grad=True)
    with torch.no_grad():
        assert not class_losses(logits, terms)[0].requires_grad
    assert not class_losses(logits.detach(), terms)[0].requires_grad
    assert class_losses(logits, terms)[0].requires_grad


def test_extreme_logits_stay_finite() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 0] = 1e4
    logits.requires_grad_()
    terms = make_terms(1, 3, 4, 4)
    terms = replace(terms, target=torch.ones_like(terms.target))
    total, *_ = class_losses(logits, terms)
    (slope,) = torch.autograd.grad(total, logits)
    assert total.isfinite()
    assert slope.isfinite().all()
