"""Samples: codes, weights, members and what the checks must see."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from handmade import EDGE_CASES, edge_case, index_maps, make_sample, same_sample
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.cache.sample import (
    MEMBERS,
    Sample,
    check_sample,
    decode_sample,
    eds_distances,
    encode_distance,
    encode_sample,
)
from panoptic_cache.pipeline.targets import SegmentMap, boundary, edge_distance

BLOCKS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 3, 3]], np.uint8).repeat(3, 0)


@given(st.lists(st.floats(0, 127.125, width=32), min_size=1))
def test_a_code_is_within_half_a_step(values: list[float]) -> None:
    distance = np.array(values, np.float32)
    decoded = eds_distances()[encode_distance(distance)]
    assert (np.abs(decoded - distance) <= 0.25 + 1e-5).all()


def test_far_is_the_last_code() -> None:
    distance = np.array([127.2, 127.3, 127.5, 300, np.inf], np.float32)
    codes = encode_distance(distance)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [254, 255, 255, 255, 255]
    assert np.isinf(eds_distances()[codes][1:]).all()


def test_codes_do_not_depend_on_the_last_bit_of_a_distance() -> None:
    # Another build of OpenCV rounds differently, by about 1e-5; codes must be the same.
    distance = np.sqrt(np.arange(128 * 128))
    lower, upper = ((distance + e).clip(min=0).astype(np.float32) for e in (-1e-4, 1e-4))
    np.testing.assert_array_equal(encode_distance(lower), encode_distance(upper))


@pytest.mark.parametrize(("d", "w_min"), [(20, 0), (20, 0.1), (7.5, 0.3)])
def test_weights_follow_the_formula(d: float, w_min: float) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    weights = replace(make_sample(BLOCKS), eds=codes).eds_weight(d, w_min)
    assert weights.dtype == np.float32
    for code in range(255):
        wanted = w_min + (1 - w_min) * math.exp(-((code / 2 / d) ** 2))
        assert weights[divmod(code, 32)] == pytest.approx(wanted, rel=1e-6)
    assert weights[-1, -1] == pytest.approx(w_min)


def test_the_error_of_a_weight_is_small() -> None:
    distance = np.linspace(0, 140, 5000, dtype=np.float32)
    exact = np.exp(-np.square(distance / 20))
    sample = replace(make_sample(BLOCKS), eds=encode_distance(distance)[None])
    assert np.abs(sample.eds_weight()[0] - exact).max() < 0.011


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_survive_encoding(name: str) -> None:
    sample = make_sample(edge_case(name), crowds=[2])
    decoded = decode_sample(sample.key, encode_sample(sample))
    assert same_sample(decoded, sample)
    check_sample(decoded)


@given(index_maps(), st.sets(st.integers(1, 5)), st.sets(st.integers(1, 5)))
def test_samples_survive_encoding(index: SegmentMap, things: set[int], crowds: set[int]) -> None:
    sample = make_sample(index, things=sorted(things), crowds=sorted(crowds))
    members = encode_sample(sample)
    assert tuple(members) == MEMBERS == tuple(sorted(MEMBERS))
    assert members == encode_sample(sample)
    decoded = decode_sample(sample.key, members)
    assert same_sample(decoded, sample)
    check_sample(decoded)


def test_another_decoder_sees_the_same_maps() -> None:
    for index in (BLOCKS, edge_case("300 segments")):
        sample = make_sample(index)
        members = encode_sample(sample)
        maps = {"segments": sample.segment_map, "eds": sample.eds, "void": sample.void}
        for name, values in maps.items():
            picture = np.asarray(Image.open(io.BytesIO(members[f"{name}.png"])))
            np.testing.assert_array_equal(picture, values)
        assert members["jpg"] == sample.photo


def test_dense_maps_are_lookups() -> None:
    sample = make_sample(BLOCKS, things=[1, 2], crowds=[2])
    centroids = sample.centroid_map()
    assert centroids.shape == (2, *BLOCKS.shape)
    assert centroids.dtype == np.float32
    wanted = np.array(sample.segments[0].centroid, np.float32)
    for y, x in np.ndindex(BLOCKS.shape):
        if BLOCKS[y, x] == 1:
            assert centroids[:, y, x].tolist() == wanted.tolist()
        else:
            assert np.isnan(centroids[:, y, x]).all()
    distance = edge_distance(boundary(BLOCKS))
    np.testing.assert_allclose(
        sample.eds_weight(5, 0.1), 0.1 + 0.9 * np.exp(-((distance / 5) ** 2)), atol=0.05
    )


def png(values: Any) -> bytes:
    return bytes(cv2.imencode(".png", values)[1])


def without(field: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        table = json.loads(data)
        del (table if field in table else table["segments"][0])[field]
        return json.dumps(table).encode()

    return change


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("eds.png", lambda data: data[:40]),
        ("eds.png", lambda _: b""),
        ("eds.png", lambda _: png(np.zeros(BLOCKS.shape, np.uint16))),
        ("void.png", lambda _: png(np.zeros((2, 2), np.uint8))),
        ("void.png", lambda _: png(np.zeros((*BLOCKS.shape, 3), np.uint8))),
        ("segments.png", lambda _: b"\x89PNG no more"),
        ("json", lambda _: b"{}"),
        ("json", lambda _: b"[1]"),
        ("json", lambda data: data[:-9]),
        ("json", lambda _: b"\xff\xfe"),
        *(("json", without(name)) for name in ("image_id", "file_name", "size", "original_size")),
        *(("json", without(name)) for name in ("segments", "area", "bbox", "centroid", "label")),
        ("json", lambda data: data.replace(b'"original_size":[', b'"original_size":[1,')),
        ("json", lambda data: data.replace(b'"area"', b'"arae"')),
    ],
)
def test_damaged_members_are_named(member: str, change: Callable[[bytes], bytes]) -> None:
    members = encode_sample(make_sample(BLOCKS))
    members[member] = change(members[member])
    with pytest.raises(InputError) as caught:
        decode_sample("000000000001", members)
    assert caught.value.code == "member-damaged"
    assert caught.value.where == f"000000000001.{member}"


@pytest.mark.parametrize("member", MEMBERS)
def test_missing_members_are_named(member: str) -> None:
    members = encode_sample(make_sample(BLOCKS))
    del members[member]
    with pytest.raises(InputError, match=member) as caught:
        decode_sample("000000000001", members)
    assert caught.value.code == "member-missing"


def first_segment(sample: Sample, **changes: Any) -> Sample:
    segments = (replace(sample.segments[0], **changes), *sample.segments[1:])
    return replace(sample, segments=segments)


def other_pixel(values: Any, value: int) -> Any:
    changed = values.copy()
    changed[1, 1] = value
    return changed


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: first_segment(s, area=s.segments[0].area + 1), "table-mismatch"),
        (lambda s: first_segment(s, bbox=(0, 0, 1, 1)), "table-mismatch"),
        (lambda s: first_segment(s, centroid=(0.0, 0.0)), "table-mismatch"),
        (lambda s: first_segment(s, centroid=None), "table-mismatch"),
        (lambda s: first_segment(s, isthing=False), "table-mismatch"),
        (lambda s: first_segment(s, iscrowd=True), "table-mismatch"),
        (lambda s: replace(s, segments=s.segments[:-1]), "table-mismatch"),
        (lambda s: replace(s, segments=(*s.segments, s.segments[0])), "table-mismatch"),
        (lambda s: replace(s, segment_map=s.segment_map.astype(np.uint16)), "table-mismatch"),
        (lambda s: replace(s, segment_map=other_pixel(s.segment_map, 2)), "table-mismatch"),
        (lambda s: replace(s, segment_map=other_pixel(s.segment_map, 9)), "table-mismatch"),
        (lambda s: replace(s, void=other_pixel(s.void, 1)), "void-mismatch"),
        (lambda s: replace(s, eds=other_pixel(s.eds, 77)), "eds-mismatch"),
    ],
)
def test_a_sample_that_contradicts_itself_is_found(
    change: Callable[[Sample], Sample], code: str
) -> None:
    sample = make_sample(BLOCKS)
    check_sample(sample)
    with pytest.raises(InputError) as caught:
        check_sample(change(sample))
    assert caught.value.code == code
