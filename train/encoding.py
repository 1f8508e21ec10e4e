"""How a centroid becomes a code that a network can regress, and how codes are compared and turned.

The paper's code is positional (section 3.3); its ablation (Table 3, appendix B) also regresses the
coordinates directly and classifies them. All that depends on the kind of code is here.

Centroids are (u, v) in [-1, 1], u to the right, v down; pixel centres lie at (x + 0.5) / W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

GRID_CELLS = 80
"""Cells along each axis of the paper's decoding grid (section 5.1)."""


@dataclass(frozen=True)
class AxisCosts:
    """How far each predicted code lies from each cell, split over the axes.

    The cost of cell (a, b) is `u[..., a] + v[..., b]`. For the positional and the direct code it is
    a squared Euclidean distance in code space, for the classification code a negative log
    probability.
    """

    u: Tensor  # (..., P, cells) costs of the columns
    v: Tensor  # (..., P, cells) costs of the rows
    void: Tensor  # (..., P) cost of being no instance


def gamma(p: Tensor, harmonics: int) -> Tensor:
    """The sine-cosine positional code of a coordinate (section 3.3).

    gamma(p) = [sin(pi p), cos(pi p), ..., sin(2^(L-1) pi p), cos(2^(L-1) pi p)], so |gamma|^2 = L
    everywhere, and gamma(-1) = gamma(1).

    Args:
        p: (...,) coordinates in [-1, 1].
        harmonics: L.

    Returns:
        (..., 2L), in the precision of `p`.
    """
    frequencies = math.pi * 2.0 ** torch.arange(harmonics, device=p.device, dtype=p.dtype)
    angles = p[..., None] * frequencies  # (..., L)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., L, 2) -> (..., 2L)


def cell_centres(cells: int, *, device: torch.device | None = None) -> Tensor:
    """Centres p_i = -1 + (2i + 1) / n of the grid's cells, (cells,) float32.

    Centres rather than ends: gamma has period 2, so a grid holding both -1 and 1 would make the
    left and the right edge one place.
    """
    return (2 * torch.arange(cells, device=device, dtype=torch.float32) + 1) / cells - 1


def nearest_cell(p: Tensor, cells: int) -> Tensor:
    """The cell each coordinate in [-1, 1] falls into, int64."""
    return ((p + 1) * (cells / 2)).floor().clamp(0, cells - 1).long()


def grid_cells(size: int) -> int:
    """Cells along each axis of the grid that validation counts hits on, for `size` pixels.

    Cells of 5 px, as the paper's 80 at 420 px: about as exact as a network's centroids are. The
    decoder has 80 at any size.
    """
    return max(1, min(GRID_CELLS, size // 5))


def nearest_cells(code: Tensor, encoding: Encoding, cells: int) -> tuple[Tensor, Tensor]:
    """(2, P) column and row of the cell that each code (K, P) is nearest to; (P,) void is nearer.

    The cost is a sum over the axes, so `cells` + `cells` costs find the best of cells x cells.
    """
    costs = encoding.axis_costs(code, cells)
    (u_cost, u), (v_cost, v) = costs.u.min(-1), costs.v.min(-1)
    return torch.stack([u, v]), costs.void < u_cost + v_cost


def nearest_centroids(code: Tensor, encoding: Encoding, cells: int) -> NDArray[np.float32]:
    """The nearest centroid of a grid at each pixel of codes (K, h, w), for pictures.

    (2, h, w) float32, (u, v) in [-1, 1]; nan where void is nearer than every cell.
    """
    cell, void = nearest_cells(code.flatten(1), encoding, cells)
    uv = cell_centres(cells, device=code.device)[cell]  # (2, P)
    uv[:, void] = torch.nan
    centroids: NDArray[np.float32] = torch.unflatten(uv, 1, code.shape[1:]).cpu().numpy()
    return centroids


@dataclass(frozen=True)
class PositionalCode:
    """concat(gamma(u), gamma(v)) in R^4L; void is the zero vector (section 3.3).

    Its methods are what the model, the losses and the decoder need to know of any code.
    """

    harmonics: int = 4

    @property
    def channels(self) -> int:
        """K, channels of the instance head: 2L for u, then 2L for v."""
        return 4 * self.harmonics

    def encode(self, centroids: Tensor, present: Tensor) -> Tensor:
        """Training targets of segments.

        Args:
            centroids: (..., 2) float, (u, v) in [-1, 1]; ignored where absent.
            present: (...,) bool, false for segments that take the void code.

        Returns:
            (..., K) codes, or (..., 2) class indices for the classification code.
        """
        code = gamma(torch.where(present[..., None], centroids, 0.0), self.harmonics)
        return code.flatten(-2) * present[..., None]  # (..., 2, 2L) -> (..., 4L)

    def axis_costs(self, code: Tensor, cells: int) -> AxisCosts:
        """Compares predicted codes (..., K, P) with a grid of `cells` x `cells`.

        |x - gamma(a)|^2 = |x|^2 + L - 2 x . gamma(a), as |gamma|^2 = L: one matrix product for each
        axis.
        """
        grid = gamma(cell_centres(cells, device=code.device), self.harmonics).to(code.dtype)
        u, v = torch.unflatten(code, -2, (2, 2 * self.harmonics)).unbind(-3)  # (..., 2L, P) each
        u_norm, v_norm = u.square().sum(-2), v.square().sum(-2)  # (..., P)
        return AxisCosts(
            u=(u_norm + self.harmonics)[..., None] - 2 * (u.transpose(-1, -2) @ grid.T),
            v=(v_norm + self.harmonics)[..., None] - 2 * (v.transpose(-1, -2) @ grid.T),
            void=u_norm + v_norm,
        )

    def mirrored(self, code: Tensor) -> Tensor:
        """Codes (K, ...) of centroids (u, v) as codes of (-u, v); void stays void.

        The map is linear, so it also holds for predictions that are not exact codes: here the sines
        of u change their sign.
        """
        turned = code.clone()
        turned[: len(code) // 2 : 2] *= -1  # the first half holds sine and cosine of u in turn
        return turned

    def to_positional(self, code: Tensor) -> Tensor:
        """Predicted codes (K, P) as positional ones (4L, P); NaN stays NaN."""
        return code


@dataclass(frozen=True)
class DirectCode:
    """(u, v, 1) with u, v scaled to [0, 1], as RGB; void is black (appendix B)."""

    @property
    def channels(self) -> int:
        """Red = u, green = v, blue = instance or not."""
        return 3

    def encode(self, centroids: Tensor, present: Tensor) -> Tensor:
        """See `PositionalCode.encode`: (..., 3) colours."""
        colour = torch.cat([(centroids + 1) / 2, torch.ones_like(centroids[..., :1])], dim=-1)
        return torch.where(present[..., None], colour, 0.0)

    def axis_costs(self, code: Tensor, cells: int) -> AxisCosts:
        """See `PositionalCode.axis_costs`; the blue channel's share is split over the axes."""
        grid = ((cell_centres(cells, device=code.device) + 1) / 2).to(code.dtype)
        red, green, blue = code.unbind(-2)  # (..., P)
        missing = (blue - 1).square()[..., None] / 2
        return AxisCosts(
            u=(red[..., None] - grid).square() + missing,
            v=(green[..., None] - grid).square() + missing,
            void=code.square().sum(-2),
        )

    def mirrored(self, code: Tensor) -> Tensor:
        """See `PositionalCode.mirrored`: (u, v, 1) becomes (1 - u, v, 1), and (0, 0, 0) stays."""
        return torch.stack([code[2] - code[0], code[1], code[2]])

    def to_positional(self, code: Tensor) -> Tensor:
        """See `PositionalCode.to_positional`: gamma of the coordinates, times the blue channel."""
        position = gamma(code[:2] * 2 - 1, PositionalCode().harmonics)  # (2, P, 2L)
        return (position * code[2].clamp(0, 1)[:, None]).transpose(1, 2).flatten(0, 1)  # (4L, P)


@dataclass(frozen=True)
class ClassificationCode:
    """The cell of u and the cell of v, classified independently (appendix B).

    The paper leaves open how a pixel says "no instance"; here each axis has one more class for it.
    """

    cells: int = GRID_CELLS

    @property
    def channels(self) -> int:
        """`cells` + 1 logits for u, then as many for v; the last of each is void."""
        return 2 * (self.cells + 1)

    def encode(self, centroids: Tensor, present: Tensor) -> Tensor:
        """See `PositionalCode.encode`: (..., 2) int64 classes of u and v."""
        return torch.where(present[..., None], nearest_cell(centroids, self.cells), self.cells)

    def axis_costs(self, code: Tensor, cells: int) -> AxisCosts:
        """See `PositionalCode.axis_costs`: negative log probabilities.

        A grid other than the trained one reads the classes at its own cell centres.
        """
        logits = torch.unflatten(code, -2, (2, self.cells + 1))  # (..., 2, cells + 1, P)
        costs = -F.log_softmax(logits.transpose(-1, -2), dim=-1)
        u, v = costs.unbind(-3)  # (..., P, cells + 1) each
        columns = nearest_cell(cell_centres(cells, device=code.device), self.cells)
        void = u[..., self.cells] + v[..., self.cells]
        return AxisCosts(u=u[..., columns], v=v[..., columns], void=void)

    def mirrored(self, code: Tensor) -> Tensor:
        """See `PositionalCode.mirrored`: the classes of u but void come in the opposite order."""
        return torch.cat([code[: self.cells].flip(0), code[self.cells :]])

    def to_positional(self, code: Tensor) -> Tensor:
        """See `PositionalCode.to_positional`: the expectation of gamma, void counting as zero."""
        costs = self.axis_costs(code, self.cells)
        grid = gamma(cell_centres(self.cells, device=code.device), PositionalCode().harmonics)
        axes = [(-cost).exp() @ grid for cost in (costs.u, costs.v)]  # (P, cells) @ (cells, 2L)
        return torch.cat(axes, dim=1).T  # (4L, P)


Encoding: TypeAlias = PositionalCode | DirectCode | ClassificationCode


def make_encoding(name: str, harmonics: int) -> Encoding:
    """The encoding a configuration names: `positional`, `direct` or `classification`."""
    if name == "positional":
        return PositionalCode(harmonics)
    return DirectCode() if name == "direct" else ClassificationCode()
