"""The decoder as a graph of tensor operations, for ONNX: votes, peaks, assignment, classes.

Every step works on tensors whose size is known beforehand, for any batch, so that one ONNX file
returns a panoptic map without Python. This is the plain decoder of the paper (section 5.2), which
does not measure noise; `evaluate/decoder` finds more in noisy codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_cache.train.encoding import Encoding, cell_centres, gamma

MOST = 100
"""Largest number of instances in an image."""
CLEAR = 0.5
"""Smallest amplitude of a code that is closer to an instance than to void; clean codes have 1."""


class GridDecoder(nn.Module):
    """Codes and logits -> panoptic map.

    Args:
        encoding: The code the network was trained with.
        isthing: (C,) bool, by label.
        cells: Cells per axis of the decoding grid.
        least: Fewest pixels of an instance, and fewest votes of a peak.
    """

    isthing: Tensor
    grid: Tensor
    kernel: Tensor

    def __init__(self, encoding: Encoding, isthing: Tensor, cells: int, *, least: int = 9) -> None:
        super().__init__()
        self.encoding, self.cells, self.least = encoding, cells, least
        self.most = min(MOST, cells * cells)
        probe = encoding.to_positional(torch.zeros(encoding.channels, 1))
        self.harmonics = probe.shape[0] // 4  # L: sine and cosine of u and v
        binomial = torch.tensor([0.5, 1.0, 0.5])
        self.register_buffer("isthing", isthing, persistent=False)
        # (cells, 2L)
        self.register_buffer("grid", gamma(cell_centres(cells), self.harmonics), persistent=False)
        self.register_buffer("kernel", (binomial[:, None] * binomial)[None, None], persistent=False)

    def forward(self, codes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Decodes a batch.

        Args:
            codes: (B, channels, h, w).
            logits: (B, C, h, w).

        Returns:
            (B, h, w) int64 map: 0 = void, 1 to C = stuff of label value - 1, above C = instance
            value - C - 1; and (B, K) int64 labels of the instances, K = `most`, -1 where there is
            none.
        """
        batch, categories, height, width = logits.shape
        labels = logits.flatten(2).argmax(1)  # (B, P), P = h w
        thing = self.isthing[labels]  # (B, P)
        flat = codes.flatten(2).transpose(0, 1).flatten(1)  # (channels, B P)
        code = self.encoding.to_positional(flat).view(4 * self.harmonics, batch, -1)
        code = code.transpose(0, 1)  # (B, 4L, P)
        prototypes, present = self.find(code, thing)  # (B, K, 4L), (B, K)
        # A clean code has squared length 2L, so its product with its own prototype is 1.
        amplitude = prototypes @ code / (2 * self.harmonics)  # (B, K, P)
        best, index = amplitude.masked_fill(~present[..., None], -1).max(1)  # (B, P)
        claimed = thing & (best > CLEAR)
        ranks = torch.arange(self.most, device=codes.device)[:, None]
        claims = ((index[:, None] == ranks) & claimed[:, None]).float()  # (B, K, P)
        # Each instance takes the label that most of its pixels have.
        ballots = claims @ F.one_hot(labels, categories).float()  # (B, K, C)
        kept = ballots.sum(-1) >= self.least
        winners = torch.where(kept, ballots.argmax(-1), -1)
        claimed = claimed & kept.gather(1, index)
        stuff = torch.where(thing, 0, labels + 1)
        values = torch.where(claimed, index + categories + 1, stuff)
        return values.view(batch, height, width), winners

    def find(self, code: Tensor, thing: Tensor) -> tuple[Tensor, Tensor]:
        """Peaks of the votes.

        Args:
            code: (B, 4L, P) positional codes.
            thing: (B, P) bool, which pixels vote.

        Returns:
            (B, K, 4L) prototypes, most votes first, and (B, K) bool, which of them are peaks.
        """
        halves = code.view(code.shape[0], 2, 2 * self.harmonics, -1)  # (B, 2, 2L, P): u, v
        best, place = (self.grid @ halves).max(2)  # (B, 2, P): nearest cell on either axis
        votes = thing & (best.sum(1) / (2 * self.harmonics) > CLEAR)
        cells = torch.arange(self.cells, device=code.device)[:, None]
        column, row = (place[:, :, None] == cells).float().unbind(1)  # (B, cells, P) one-hot
        # The product of the one-hot maps counts the votes of each cell.
        table = (row * votes[:, None]) @ column.transpose(1, 2)  # (B, cells, cells) of votes
        smooth = F.conv2d(table[:, None], self.kernel, padding=1)
        peaks = (smooth == F.max_pool2d(smooth, 3, 1, 1)) & (smooth >= self.least)
        height, at = torch.where(peaks, smooth, 0.0).flatten(1).topk(self.most)  # (B, K)
        prototypes = torch.cat([self.grid[at % self.cells], self.grid[at // self.cells]], -1)
        return prototypes, height > 0
