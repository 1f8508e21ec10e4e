"""The targets against their definitions, written as loops over pixels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from handmade import EDGE_CASES, edge_case, index_maps
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from panoptic_cache.pipeline.targets import (
    SegmentMap,
    boundary,
    compute_targets,
    drop_empty_rows,
    edge_distance,
    geometry,
    make_segment_map,
    resize_segment_map,
    segment_dtype,
    void_mask,
)


def boundary_by_loops(index: SegmentMap) -> list[list[bool]]:
    height, width = index.shape

    def differs(y: int, x: int) -> bool:
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        return any(
            index[b, a] != index[y, x] for b, a in near if 0 <= b < height and 0 <= a < width
        )

    return [[differs(y, x) for x in range(width)] for y in range(height)]


def distance_by_loops(edges: NDArray[np.bool_]) -> list[list[float]]:
    height, width = edges.shape
    points = [(y, x) for y in range(height) for x in range(width) if edges[y, x]]
    return [
        [min((math.hypot(y - b, x - a) for b, a in points), default=math.inf) for x in range(width)]
        for y in range(height)
    ]


def check_boundary_and_distance(index: SegmentMap) -> None:
    edges = boundary(index)
    assert edges.tolist() == boundary_by_loops(index)
    distance = edge_distance(edges)
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, distance_by_loops(edges), rtol=1e-5)


def check_geometry(index: SegmentMap, count: int) -> None:
    height, width = index.shape
    found = geometry(index, count)
    assert found.area.shape == (count,)
    for row in range(count):
        pixels = [
            (y, x) for y in range(height) for x in range(width) if int(index[y, x]) == row + 1
        ]
        assert found.area[row] == len(pixels)
        if not pixels:
            assert found.bbox[row].tolist() == [0, 0, 0, 0]
            assert np.isnan(found.centroid[row]).all()
            continue
        ys, xs = zip(*pixels, strict=True)
        box = [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
        assert found.bbox[row].tolist() == box
        half = Fraction(1, 2)
        u = sum((x + half) / width for x in xs) / len(xs) * 2 - 1
        v = sum((y + half) / height for y in ys) / len(ys) * 2 - 1
        np.testing.assert_allclose(found.centroid[row], [float(u), float(v)], atol=1e-14)


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_follow_the_definitions(name: str) -> None:
    index = edge_case(name)
    check_boundary_and_distance(index)
    check_geometry(index, int(index.max()))


@given(index_maps())
def test_boundary_and_distance_follow_the_definitions(index: SegmentMap) -> None:
    check_boundary_and_distance(index)


@given(index_maps(), st.integers(0, 3))
def test_geometry_follows_the_definition(index: SegmentMap, empty: int) -> None:
    check_geometry(index, int(index.max()) + empty)


@given(
    st.lists(st.integers(1, 2**24 - 1), max_size=6, unique=True),
    st.integers(1, 6),
    st.integers(1, 6),
    st.data(),
)
def test_index_map_is_a_lookup(
    known: list[int], height: int, width: int, data: st.DataObject
) -> None:
    values = st.sampled_from([0, 7, 2**24 - 1, *known])
    pixels = data.draw(st.lists(values, min_size=height * width, max_size=height * width))
    ids = np.array(pixels, np.int32).reshape(height, width)
    rows = {identity: row for row, identity in enumerate(known, start=1)}
    index = make_segment_map(ids, known)
    assert index.tolist() == [[rows.get(int(i), 0) for i in line] for line in ids]
    assert index.dtype == np.uint8


@pytest.mark.parametrize(("count", "dtype"), [(0, "uint8"), (255, "uint8"), (256, "uint16")])
def test_index_type_holds_the_segments(count: int, dtype: str) -> None:
    ids = np.arange(1, 301, dtype=np.int32).reshape(15, 20) * 50_000
    index = make_segment_map(ids, [50_000 * (i + 1) for i in range(count)])
    assert index.dtype.name == dtype == np.dtype(segment_dtype(count)).name
    assert index.ravel().tolist() == [i if i <= count else 0 for i in range(1, 301)]


@given(index_maps(), st.data())
def test_renaming_ids_changes_nothing(index: SegmentMap, data: st.DataObject) -> None:
    count = int(index.max())
    names = st.lists(
        st.integers(1, 2**24 - 1), min_size=count, max_size=count, unique=True
    )  # fmt: skip
    for ids in (data.draw(names), data.draw(names)):
        painted = np.array([0, *ids], np.int32)[index]
        np.testing.assert_array_equal(make_segment_map(painted, ids), index)


@given(index_maps(), st.permutations(range(1, 6)))
def test_order_of_the_table_orders_the_rows_only(index: SegmentMap, order: list[int]) -> None:
    count = int(index.max())
    moved = np.array([0, *order], np.uint8)[index]
    np.testing.assert_array_equal(boundary(moved), boundary(index))
    before, after = geometry(index, count), geometry(moved, 5)
    for row in range(count):
        assert after.area[order[row] - 1] == before.area[row]
        assert after.centroid[order[row] - 1].tolist() == before.centroid[row].tolist()


@given(index_maps())
def test_flips_and_transposition_carry_over(index: SegmentMap) -> None:
    count = int(index.max())
    plain, flipped = geometry(index, count), geometry(index[:, ::-1], count)
    np.testing.assert_allclose(flipped.centroid, plain.centroid * [-1, 1], atol=1e-14)
    turned = geometry(np.ascontiguousarray(index.T), count)
    np.testing.assert_allclose(turned.centroid, plain.centroid[:, ::-1], atol=1e-14)
    distance = edge_distance(boundary(index))
    mirrored = edge_distance(boundary(np.ascontiguousarray(index[:, ::-1])))
    np.testing.assert_allclose(mirrored, distance[:, ::-1], rtol=1e-5)


def test_distance_of_a_large_map_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 9, (6, 8)).astype(np.uint8).repeat(67, 0).repeat(75, 1)
    edges = boundary(index)
    np.testing.assert_allclose(edge_distance(edges), distance_transform_edt(~edges), atol=2e-5)


def test_both_sides_of_an_edge_are_at_distance_zero() -> None:
    index = np.repeat(np.array([[1, 2]], np.uint8), 4, axis=1)
    assert edge_distance(boundary(index)).tolist() == [[3, 2, 1, 0, 0, 1, 2, 3]]


def test_without_a_boundary_the_distance_is_infinite() -> None:
    assert np.isinf(edge_distance(boundary(np.ones((70, 90), np.uint8)))).all()


@given(index_maps(), st.lists(st.booleans(), min_size=5, max_size=5))
def test_void_mask_follows_the_definition(index: SegmentMap, crowd: list[bool]) -> None:
    iscrowd = crowd[: int(index.max())]
    wanted = [
        [1 if value == 0 else 2 if iscrowd[value - 1] else 0 for value in line]
        for line in index.tolist()
    ]
    void = void_mask(index, iscrowd)
    assert void.tolist() == wanted
    assert void.dtype == np.uint8
    assert compute_targets(index, iscrowd).void.tolist() == wanted


@given(index_maps(), st.integers(1, 20), st.integers(1, 20))
def test_resize_takes_the_pixel_under_each_centre(
    index: SegmentMap, height: int, width: int
) -> None:
    rows, columns = (
        resize_segment_map(np.arange(index.shape[axis], dtype=np.uint8)[None], (1, size))[
            0
        ].tolist()
        for axis, size in enumerate((height, width))
    )
    assert resize_segment_map(index, (height, width)).tolist() == index[rows][:, columns].tolist()
    for axis, (size, taken) in enumerate(((height, rows), (width, columns))):
        centres = (np.arange(size) + 0.5) * index.shape[axis] / size
        # A centre on the border of two pixels may take either.
        assert (np.abs(centres - (np.array(taken) + 0.5)) <= 0.5 + 1e-3).all()


@given(index_maps(), st.sets(st.integers(1, 5)))
def test_dropping_empty_rows_keeps_what_is_seen(index: SegmentMap, gone: set[int]) -> None:
    count = int(index.max())
    index = np.where(np.isin(index, sorted(gone)), 0, index).astype(np.uint8)
    smaller, kept = drop_empty_rows(index, count)
    assert kept.tolist() == sorted({int(value) - 1 for value in index.ravel()} - {-1})
    np.testing.assert_array_equal(np.array([0, *(kept + 1)])[smaller], index)


def test_dropping_rows_narrows_the_type() -> None:
    index = edge_case("300 segments")
    smaller, kept = drop_empty_rows(np.where(index > 255, 0, index).astype(np.uint16), 300)
    assert smaller.dtype == np.uint8
    assert len(kept) == 255
