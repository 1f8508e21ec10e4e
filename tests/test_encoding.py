"""The codes against their definitions and against full distances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panoptic_cache.train.encoding import (
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
    cell_centres,
    gamma,
    make_encoding,
    nearest_cell,
)

coordinates = st.floats(-1, 1, allow_nan=False)
harmonic_counts = st.integers(1, 6)


def gamma_by_hand(p: float, harmonics: int) -> list[float]:
    code = []
    for k in range(harmonics):
        code += [math.sin(2**k * math.pi * p), math.cos(2**k * math.pi * p)]
    return code


def centre_by_hand(cell: int, cells: int) -> float:
    return -1 + (2 * cell + 1) / cells


def square(one: list[float], other: list[float]) -> float:
    return math.dist(one, other) ** 2


def noisy_codes(encoding: Encoding, pixels: int = 7) -> Tensor:
    """(2, channels, pixels): two images, so that leading axes are tried too."""
    return torch.randn(
        2, encoding.channels, pixels, generator=torch.Generator().manual_seed(0), dtype=torch.double
    )


@given(coordinates, harmonic_counts)
def test_gamma_follows_the_definition(p: float, harmonics: int) -> None:
    code = gamma(torch.tensor(p, dtype=torch.double), harmonics)
    assert code.tolist() == pytest.approx(gamma_by_hand(p, harmonics), abs=1e-12)


@given(coordinates, harmonic_counts)
def test_gamma_has_one_length_everywhere(p: float, harmonics: int) -> None:
    code = gamma(torch.tensor([p], dtype=torch.double), harmonics)
    assert code.square().sum().item() == pytest.approx(harmonics)


def test_gamma_joins_the_ends() -> None:
    ends = gamma(torch.tensor([-1.0, 1.0], dtype=torch.double), 4)
    torch.testing.assert_close(ends[0], ends[1])


@given(coordinates, coordinates)
def test_a_flip_negates_the_sines_of_u(u: float, v: float) -> None:
    encoding = PositionalCode(4)
    places = torch.tensor([[u, v], [-u, v]], dtype=torch.double)
    code, flipped = encoding.encode(places, torch.tensor([True, True]))
    sign = torch.ones(16, dtype=torch.double)
    sign[0:8:2] = -1
    torch.testing.assert_close(flipped, code * sign)


def test_distances_on_the_papers_grid() -> None:
    centres = cell_centres(80)
    assert centres.tolist() == pytest.approx([centre_by_hand(i, 80) for i in range(80)], abs=1e-6)
    grid = gamma(centres.double(), 4)
    assert grid.norm(dim=1).tolist() == pytest.approx([2.0] * 80)  # the distance to void per axis
    from_last = (grid[:-1] - grid[-1]).norm(dim=1)
    assert from_last[-1].item() == pytest.approx(0.715, abs=5e-4)  # neighbours
    assert from_last.max().item() == pytest.approx(3.51, abs=5e-3)
    assert (from_last.max() / from_last.min()).item() == pytest.approx(4.91, abs=5e-3)
    plain = (centres[:-1] - centres[-1]).abs()
    assert (plain.max() / plain.min()).item() == pytest.approx(79, rel=1e-4)
    # The first cell is as close to the last as a neighbour is: peaks merge in cell space only.
    assert from_last[0].item() == pytest.approx(from_last[-1].item(), rel=1e-4)


@pytest.mark.parametrize("cells", [1, 2, 7, 80])
def test_each_centre_falls_into_its_own_cell(cells: int) -> None:
    assert nearest_cell(cell_centres(cells), cells).tolist() == list(range(cells))
    assert nearest_cell(torch.tensor([-1.0, 1.0]), cells).tolist() == [0, cells - 1]


@given(coordinates, st.integers(1, 90))
def test_the_nearest_cell_is_the_nearest(p: float, cells: int) -> None:
    found = int(nearest_cell(torch.tensor(p, dtype=torch.double), cells))
    distances = [abs(p - centre_by_hand(cell, cells)) for cell in range(cells)]
    assert distances[found] <= min(distances) + 1e-12


def test_positional_targets_and_void() -> None:
    places = torch.tensor([[0.25, -0.5], [0.5, 0.5], [math.nan, math.nan]], dtype=torch.double)
    encoding = PositionalCode(3)
    codes = encoding.encode(places, torch.tensor([True, False, False]))
    assert codes.shape == (3, encoding.channels) == (3, 12)
    wanted = gamma_by_hand(0.25, 3) + gamma_by_hand(-0.5, 3)
    assert codes[0].tolist() == pytest.approx(wanted, abs=1e-12)
    assert codes[1:].abs().sum() == 0


def test_direct_targets_and_void() -> None:
    places = torch.tensor([[0.5, -1.0], [0.5, 0.5], [math.nan, math.nan]])
    codes = DirectCode().encode(places, torch.tensor([True, False, False]))
    assert codes.tolist() == [[0.75, 0.0, 1.0], [0.0] * 3, [0.0] * 3]


def test_classes_and_void() -> None:
    places = torch.tensor([[-0.99, 0.99], [0.0, -0.01], [math.nan, math.nan]])
    encoding = ClassificationCode()
    codes = encoding.encode(places, torch.tensor([True, True, False]))
    assert codes.tolist() == [[0, 79], [40, 39], [80, 80]]
    assert codes.dtype == torch.int64
    assert encoding.channels == 162


@pytest.mark.parametrize("cells", [1, 5, 80])
@pytest.mark.parametrize("harmonics", [1, 4])
def test_positional_costs_are_squared_distances(cells: int, harmonics: int) -> None:
    encoding = PositionalCode(harmonics)
    codes = noisy_codes(encoding)
    costs = encoding.axis_costs(codes, cells)
    assert costs.u.shape == costs.v.shape == (2, 7, cells)
    for image in range(2):
        for pixel in range(7):
            code = codes[image, :, pixel].tolist()
            assert costs.void[image, pixel].item() == pytest.approx(
                square(code, [0.0] * len(code)), rel=1e-6
            )
            for a in range(0, cells, 7):
                for b in range(0, cells, 11):
                    cell = [
                        *gamma_by_hand(centre_by_hand(a, cells), harmonics),
                        *gamma_by_hand(centre_by_hand(b, cells), harmonics),
                    ]
                    found = costs.u[image, pixel, a] + costs.v[image, pixel, b]
                    assert found.item() == pytest.approx(square(code, cell), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cells", [1, 5, 80])
def test_direct_costs_are_squared_distances(cells: int) -> None:
    encoding = DirectCode()
    codes = noisy_codes(encoding)
    costs = encoding.axis_costs(codes, cells)
    for image in range(2):
        for pixel in range(7):
            code = codes[image, :, pixel].tolist()
            assert costs.void[image, pixel].item() == pytest.approx(square(code, [0.0] * 3))
            for a in range(0, cells, 7):
                for b in range(0, cells, 11):
                    red, green = ((centre_by_hand(i, cells) + 1) / 2 for i in (a, b))
                    found = costs.u[image, pixel, a] + costs.v[image, pixel, b]
                    wanted = square(code, [red, green, 1.0])
                    assert found.item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def softmax_by_hand(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


@pytest.mark.parametrize("cells", [80, 40, 33, 160])
def test_classification_costs_are_negative_log_probabilities(cells: int) -> None:
    encoding = ClassificationCode()
    codes = noisy_codes(encoding, pixels=3)
    costs = encoding.axis_costs(codes, cells)
    assert costs.u.shape == costs.v.shape == (2, 3, cells)
    for image in range(2):
        for pixel in range(3):
            logits = codes[image, :, pixel].tolist()
            u, v = softmax_by_hand(logits[:81]), softmax_by_hand(logits[81:])
            void = -math.log(u[80] * v[80])
            assert costs.void[image, pixel].item() == pytest.approx(void)
            for a in range(cells):
                place = (centre_by_hand(a, cells) + 1) / 2 * 80
                # A centre on the border of two trained cells may take either.
                near = {int(place - 1e-5), int(place + 1e-5)}
                for found, wanted in ((costs.u, u), (costs.v, v)):
                    assert found[image, pixel, a].item() in [
                        pytest.approx(-math.log(wanted[cell])) for cell in near
                    ]


@pytest.mark.parametrize("name", ["positional", "direct"])
@given(u=coordinates, v=coordinates)
def test_a_true_code_is_cheapest_in_its_own_cell(name: str, u: float, v: float) -> None:
    encoding = make_encoding(name, 4)
    place = torch.tensor([[u, v]], dtype=torch.double)
    costs = encoding.axis_costs(encoding.encode(place, torch.tensor([True])).T, 80)
    for axis, cost in ((0, costs.u[0]), (1, costs.v[0])):
        own = cost[nearest_cell(place[0, axis], 80)]
        assert own <= cost.min() + 1e-4  # more on the border of two cells only
    assert costs.u.min() + costs.v.min() < costs.void[0]
    none = encoding.encode(place, torch.tensor([False])).T
    costs = encoding.axis_costs(none, 80)
    assert costs.void[0] == 0
    assert costs.u.min() + costs.v.min() > 0.9


# What turns codes


CENTROIDS = torch.tensor([[-0.9, 0.3], [0.0, -1.0], [0.4125, 0.7], [0.1, 0.2]])
PRESENT = torch.tensor([True, True, True, False])
MIRRORED = CENTROIDS * torch.tensor([-1.0, 1.0])


@pytest.mark.parametrize("encoding", [PositionalCode(), PositionalCode(2), DirectCode()])
def test_a_mirrored_code_is_the_code_of_the_mirrored_centroid(
    encoding: PositionalCode | DirectCode,
) -> None:
    code = encoding.encode(CENTROIDS, PRESENT).T
    expected = encoding.encode(MIRRORED, PRESENT).T
    assert torch.allclose(encoding.mirrored(code), expected, atol=1e-6)
    assert torch.allclose(encoding.mirrored(expected), code, atol=1e-6)


def test_mirrored_classes() -> None:
    encoding = ClassificationCode(10)

    def logits(centroids: Tensor) -> Tensor:
        classes = encoding.encode(centroids, PRESENT)  # (N, 2)
        return torch.nn.functional.one_hot(classes, 11).flatten(1).T.float()

    # Off the borders of cells, where rounding would decide.
    inside = torch.tensor([[-0.93, 0.3], [0.05, -0.9], [0.41, 0.7], [0.1, 0.2]])
    found = encoding.mirrored(logits(inside))
    assert torch.equal(found, logits(inside * torch.tensor([-1.0, 1.0])))


@pytest.mark.parametrize("encoding", [PositionalCode(), DirectCode(), ClassificationCode(16)])
def test_true_codes_of_any_kind_are_positional_codes(encoding: Encoding) -> None:
    centres = cell_centres(16)[torch.tensor([[0, 3], [15, 8], [7, 7], [2, 2]])]  # (4, 2)
    code = encoding.encode(centres, PRESENT)
    if isinstance(encoding, ClassificationCode):
        code = 30.0 * torch.nn.functional.one_hot(code, 17).flatten(1)  # sure of its classes
    wanted = gamma(centres, 4).flatten(1) * PRESENT[:, None]
    torch.testing.assert_close(encoding.to_positional(code.T.float()), wanted.T)


def test_encodings_go_by_name() -> None:
    assert make_encoding("positional", 3) == PositionalCode(3)
    assert make_encoding("direct", 3) == DirectCode()
    assert make_encoding("classification", 3) == ClassificationCode(80)
