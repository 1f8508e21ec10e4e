"""The decoder as a graph of tensor operations, for ONNX: a photo's panoptic map without Python.

Every step works on tensors whose size is known beforehand, for any batch. It is the decoder of
`evaluate/decoder` but for means of noisy codes, and for exact votes, which no network casts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_cache.evaluate.decoder import instances
from panoptic_cache.evaluate.decoder.decode import DecodeConfig
from panoptic_cache.evaluate.decoder.field import LARGEST_LEAD, TYPICAL_POWER
from panoptic_cache.evaluate.decoder.segments import OFF_CENTRE
from panoptic_cache.train.encoding import GRID_CELLS, Encoding, cell_centres, gamma

MOST = 100
"""Largest number of basins in an image; number `MOST` stands for none of them."""
ROUNDS = 12
"""Of merging; on saved heads more change nothing."""
BINS, BINS_A_CELL = 256, 64
"""Of the histogram that the median step between votes is read from."""
NEVER = -1e4
"""Log odds of what cannot be, where a product with 0 must be a number."""


class GridDecoder(nn.Module):
    """Codes and logits -> panoptic map, see `forward`.

    Args:
        encoding: The code the network was trained with.
        isthing: (C,) bool, by label.
        cells: Cells per axis of the decoding grid.
    """

    isthing: Tensor
    grid: Tensor
    turn: Tensor
    apart: Tensor

    def __init__(self, encoding: Encoding, isthing: Tensor, cells: int = GRID_CELLS) -> None:
        super().__init__()
        self.encoding, self.cells, self.config = encoding, cells, DecodeConfig(cells=cells)
        self.harmonics = len(encoding.to_positional(torch.zeros(encoding.channels, 1))) // 4
        centres, near = cell_centres(cells), 0.1 / cells
        ends = [gamma(centres + shift, self.harmonics) for shift in (near, -near)]
        at = torch.arange(cells, dtype=torch.float32)
        tables = {
            "isthing": isthing,
            "grid": gamma(centres, self.harmonics),  # (cells, 2L)
            "turn": (ends[0] - ends[1]) / (near * cells),  # (cells, 2L), for one cell to the right
            "apart": (at[:, None] - at).abs(),  # (cells, cells)
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, codes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Decodes a batch.

        Args:
            codes: (B, channels, h, w).
            logits: (B, C, h, w).

        Returns:
            (B, h, w) int64 map: 0 = void, 1 to C = stuff of label value - 1, above C = instance
            value - C - 1; and (B, K) int64 labels of the instances, K = `MOST`, -1 where there is
            none.
        """
        batch, categories, height, width = logits.shape
        thing, stuff, chance = self.read_classes(logits.flatten(2))  # (B, P) each, P = h w
        flat = codes.flatten(2).transpose(0, 1).flatten(1)  # (channels, B P)
        code = self.encoding.to_positional(flat).view(4 * self.harmonics, batch, -1)
        place, length = self.nearest(code.transpose(0, 1))  # (B, 2, P), (B, P)
        power = length.pow(TYPICAL_POWER) * (chance >= 0.5)
        typical = (power * length).sum(1, keepdim=True) / power.sum(1, keepdim=True).clamp_min(1e-9)
        bar = typical * (0.5 + self.config.trust * (1 - 2 * chance))
        votes = (length > bar.clamp_min(1e-6))[:, None].float()  # (B, 1, P)
        weight = votes * (length / typical.clamp_min(1e-6)).clamp(max=1.0)[:, None]

        kind = torch.where(chance >= 0.5, thing, -1).view(batch, height, width)
        basin, beside = self.find_basins(place, weight, votes, kind)
        rows, columns = (
            (torch.arange(side, device=codes.device) + 0.5) * (self.cells / side) - 0.5
            for side in (height, width)
        )
        at = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])
        at = at.flatten(1).expand(batch, -1, -1)  # (B, 2, P)
        squares = at.square().sum(1, keepdim=True)
        values = torch.cat([votes, weight, weight * place, weight * at, votes * at], 1)
        moments = tally(basin, torch.cat([values, votes * squares], 1), MOST + 1)
        kinds = tally(basin * categories + thing, votes * chance[:, None], (MOST + 1) * categories)
        chances = kinds.view(batch, MOST + 1, categories)
        sums = torch.cat([moments.transpose(1, 2), chances], 2)  # (B, K + 1, 9 + C)
        pixel = ((columns[1] - columns[0]) * (rows[1] - rows[0])).sqrt()  # cells
        owner = basin.view(batch, height, width)
        facts = torch.zeros((), device=codes.device)
        for one, other, step in steps(owner, place.view(batch, 2, height, width)):
            facts = facts + between(one, other, torch.stack([torch.ones_like(step), step], 1))
        root, sums = merge(sums, facts, beside, pixel)

        scores = score(sums)
        kept = (scores >= self.config.least_score) & (scores > 0)
        kept = kept & (torch.arange(MOST + 1, device=codes.device) < MOST)
        labels = torch.where(kept, sums[..., 9:].argmax(2), -1)[:, :MOST]
        found = root.gather(1, basin)
        rest = torch.where(chance >= 0.5, 0, stuff + 1)
        shown = torch.where(kept.gather(1, found), found + categories + 1, rest)
        return shown.view(batch, height, width), labels

    def read_classes(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`field.read_classes` of (B, C, P) logits: thing, stuff and chance."""
        best, winner = logits.max(1, keepdim=True)  # (B, 1, P)
        labels = torch.arange(logits.shape[1], device=logits.device)
        second = logits.masked_fill(labels[:, None] == winner, NEVER).amax(1, keepdim=True)
        lead = (best - second).clamp(max=LARGEST_LEAD)
        least = self.config.least_class * torch.ones_like(lead).sum(2)  # (B, 1)
        held = tally(winner[:, 0], lead, logits.shape[1])[:, 0] >= least  # (B, C)
        held = held | ~held.any(1, keepdim=True)
        things, thing = logits.masked_fill(~(held & self.isthing)[..., None], NEVER).max(1)
        stuffs, stuff = logits.masked_fill(~(held & ~self.isthing)[..., None], NEVER).max(1)
        return thing, stuff, torch.sigmoid(things - stuffs)

    def nearest(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """`field.nearest` of (B, 4L, P) codes: places and lengths."""
        halves = code.view(code.shape[0], 2, 2 * self.harmonics, -1)  # (B, 2, 2L, P): u, v
        along, cell = (self.grid @ halves).max(2)  # (B, 2, P)
        along = along / self.harmonics
        across = (halves.transpose(2, 3) * self.turn[cell]).sum(3) / self.turn[0].square().sum()
        place = cell + (across / along.clamp_min(0.05)).clamp(-0.5, 0.5)
        return place, along.amin(1).clamp_min(0)

    def find_basins(
        self, place: Tensor, weight: Tensor, votes: Tensor, kind: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`instances.find_basins`, where each cell leads to its highest neighbour.

        (B, P) the basin of each pixel, `MOST` where none; (B, K + 1, K + 1) bool, which ones are
        neighbours on the grid. Basins with the most votes come first.
        """
        side, (batch, height, width) = self.cells, kind.shape
        column, row = place.round().long().clamp(0, side - 1).unbind(1)
        cell = row * side + column  # (B, P)
        table = tally(cell, weight, side**2).view(batch, side, side)

        # The median of the steps between votes of neighbours of one kind.
        alike = torch.where(votes.view(batch, height, width) > 0, kind, -2)
        bins = torch.zeros_like(table[:, 0, :1])
        for one, other, step in steps(alike, place.view(batch, 2, height, width)):
            valid = ((one == other) & (one > -2)).flatten(1).float()
            index = (step * BINS_A_CELL).long().clamp(max=BINS - 1).flatten(1)
            bins = bins + tally(index, valid[:, None], BINS)[:, 0].cumsum(1)  # (B, bins)
        gap = (bins < bins[:, -1:] / 2).sum(1) / BINS_A_CELL  # (B,) cells
        width_ = (self.config.blur * gap).clamp_min(instances.LEAST_WIDTH)[:, None, None]
        kernel = torch.exp(-0.5 * (self.apart / width_).square()) * (self.apart <= 3 * width_ + 0.5)
        hill = kernel @ table @ kernel  # (B, cells, cells)
        hill = hill * (hill > 1e-4 * hill.amax((1, 2), keepdim=True))

        wide = F.pad(hill, (1, 1, 1, 1), value=-1.0)
        shifts = [(dy, dx) for dy in range(3) for dx in range(3)]
        around = [wide[:, dy : dy + side, dx : dx + side] for dy, dx in shifts]
        up = torch.stack(around, -1).argmax(-1)  # 4 where a cell is a peak
        itself = torch.arange(side**2, device=place.device).view(side, side)
        leads = torch.where(hill > 0, itself + (up // 3 - 1) * side + up % 3 - 1, itself).flatten(1)
        for _ in range(side.bit_length() + 1):  # each doubles the way
            leads = leads.gather(1, leads)
        mass, top = tally(leads, table.view(batch, 1, -1), side**2)[:, 0].topk(MOST)  # (B, K)
        same = leads[:, None] == torch.where(mass > 0, top, -1)[..., None]  # (B, K, cells^2)
        ranks = torch.where(same.any(1), same.float().argmax(1), MOST)
        basin = torch.where(votes[:, 0] > 0, ranks.gather(1, cell), MOST)

        field = torch.where(hill > 0, ranks.view(batch, side, side), MOST)
        late, early, every = slice(1, None), slice(None, -1), slice(None)
        pairs = [((every, late), (every, early)), ((late, every), (early, every))]
        pairs += [((late, late), (early, early)), ((late, early), (early, late))]
        beside = [
            between(field[:, *a], field[:, *b], torch.ones_like(hill[:, None, *a]))
            for a, b in pairs
        ]
        return basin, torch.cat(beside, 1).sum(1) > 0


def tally(index: Tensor, values: Tensor, count: int) -> Tensor:
    """(B, F, count) sums of (B, F, N) values by (B, N) index."""
    sums = values.new_zeros(values.shape[0], values.shape[1], count)
    return sums.scatter_add(2, index[:, None].expand_as(values), values)


def steps(owner: Tensor, place: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of neighbours in a row and in a column: the owners of both, and how far votes are apart.

    Owners are (B, h, w), places (B, 2, h, w).
    """
    across, down = place.diff(dim=3), place.diff(dim=2)
    return [
        (owner[..., 1:], owner[..., :-1], across.square().sum(1).sqrt()),
        (owner[:, 1:], owner[:, :-1], down.square().sum(1).sqrt()),
    ]


def between(one: Tensor, other: Tensor, values: Tensor) -> Tensor:
    """(B, F, K + 1, K + 1) sums of (B, F, ...) values by the two (B, ...) basins of a pair."""
    one, other, size = one.flatten(1), other.flatten(1), MOST + 1
    border = (one != other) & (one < MOST) & (other < MOST)
    sums = tally(one * size + other, values.flatten(2) * border[:, None], size**2)
    sums = sums.view(*sums.shape[:2], size, size)
    return sums + sums.transpose(2, 3)


def merge(sums: Tensor, facts: Tensor, beside: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """`instances.merge`: (B, K + 1) the basin that each one has become a part of, and new sums."""
    itself = torch.arange(MOST + 1, device=sums.device)
    root = itself.expand(sums.shape[0], -1)
    for _ in range(ROUNDS):
        near = (facts[:, 0] > 0) | beside
        odds, partner = torch.where(near, log_odds(sums, facts, pixel), NEVER).max(2)
        mutual = (odds > 0) & (partner.gather(1, partner) == itself)
        into = torch.where(mutual, torch.minimum(partner, itself), itself)  # (B, K + 1)
        move = F.one_hot(into, MOST + 1).float()  # (B, from, to)
        back, apart = move.transpose(1, 2), itself[:, None] != itself
        sums, root = back @ sums, into.gather(1, root)
        facts = back[:, None] @ facts @ move[:, None] * apart
        beside = (back @ beside.float() @ move * apart) > 0
    return root, sums


def log_odds(sums: Tensor, facts: Tensor, pixel: Tensor) -> Tensor:
    """`instances.log_odds` of all pairs, (B, K + 1, K + 1)."""
    middle = sums[..., 2:6] / sums[..., 1:2].clamp_min(1e-9)
    apart = middle[:, :, None] - middle[:, None]  # (B, K + 1, K + 1, 4)
    votes, pixels = apart[..., :2], apart[..., 2:]
    between_votes = votes.square().sum(-1).sqrt().clamp_min(1e-3)
    unlike = (votes - pixels).square().sum(-1).sqrt() / between_votes
    touches, total = facts.unbind(1)
    slope = (total / touches.clamp_min(1) / pixel).clamp(0.1, 10.0).log()
    smaller = torch.minimum(sums[:, :, None, 0], sums[:, None, :, 0]).clamp_min(1)
    neck = (touches.clamp_min(1) / smaller.sqrt()).log()
    border = instances.TOUCH + instances.SLOPE * slope + instances.NECK * neck
    shares = sums[..., 9:] / sums[..., 9:].sum(-1, keepdim=True).clamp_min(1e-9)
    alike = shares @ shares.transpose(1, 2)
    odds = instances.DRIFT * unlike.clamp(max=20.0).log1p() + instances.CLASS * alike
    return instances.BIAS + odds + torch.where(touches > 0, border, 0.0)


def score(sums: Tensor) -> Tensor:
    """The score of `segments.draw`, (B, K + 1)."""
    area = sums[..., 0].clamp_min(1)
    middle = sums[..., 6:8] / area[..., None]
    vote = sums[..., 2:4] / sums[..., 1:2].clamp_min(1e-9)
    off = (vote - middle).square().sum(2).sqrt()
    spread = (sums[..., 8] / area - middle.square().sum(2)).clamp_min(0).sqrt().clamp_min(0.5)
    sure = sums[..., 1] / area * sums[..., 9:].sum(2) / area
    return sure * torch.exp(-OFF_CENTRE * off / spread)
