"""An exponential moving average of the weights, which often predicts better than the last ones."""

from __future__ import annotations

import copy

import torch

from panoptic_cache.train.model import PanopticModel


class Ema:
    """The average of a model's weights over its steps.

    Every rank keeps its own: weights are the same on all of them, so averages are too, bit for bit.

    Args:
        model: On its device, before it is wrapped; the average begins as its weights.
        decay: Of the average a step, below 1; 0.9999 looks back over some 10,000 steps.

    Attributes:
        model: Holds the average; in evaluation mode, without gradients.
    """

    def __init__(self, model: PanopticModel, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: PanopticModel, step: int) -> None:
        """Takes the weights after 0-based `step` into the average.

        Early averages are short, (step + 1) / (step + 10) at most: they forget where it began.
        """
        decay = min(self._decay, (step + 1) / (step + 10))
        average = [value.data for value in self.model.parameters()]
        current = [value.data for value in model.parameters()]
        torch._foreach_lerp_(average, current, 1 - decay)
