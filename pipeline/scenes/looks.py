"""How the things and stuff of synthetic scenes look: coordinates in, masks and colours out.

A thing is a signed distance, which gives its mask, its antialiased edge and its shadow, with a
blend of two colours and a brightness. A stuff is a texture. No surface is flat, as in photos.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.floating[Any]]
"""(h, w), or broadcastable to it."""
Picture = npt.NDArray[np.float32]
"""(h, w, 3), RGB in [0, 1]."""


Look = str
"""What can be painted: the name of a category, or "unknown"."""
THINGS: tuple[Look, ...] = ("ball", "crate", "tent", "ring", "star")
CATEGORIES: list[dict[str, Any]] = [
    {"id": 1, "name": "ball", "supercategory": "round", "isthing": 1, "color": [220, 60, 70]},
    {"id": 3, "name": "crate", "supercategory": "angular", "isthing": 1, "color": [190, 120, 50]},
    {"id": 4, "name": "tent", "supercategory": "angular", "isthing": 1, "color": [140, 70, 200]},
    {"id": 8, "name": "ring", "supercategory": "round", "isthing": 1, "color": [250, 140, 40]},
    {"id": 13, "name": "star", "supercategory": "angular", "isthing": 1, "color": [240, 210, 60]},
    {"id": 21, "name": "sky", "supercategory": "open", "isthing": 0, "color": [130, 180, 230]},
    {"id": 22, "name": "wall", "supercategory": "built", "isthing": 0, "color": [150, 90, 80]},
    {"id": 40, "name": "grass", "supercategory": "ground", "isthing": 0, "color": [90, 160, 70]},
    {"id": 57, "name": "water", "supercategory": "ground", "isthing": 0, "color": [40, 100, 150]},
]
"""The categories as COCO lists them; the ids have gaps, like COCO's."""


@dataclass(frozen=True)
class Shape:
    """Where a thing is."""

    x: float  # Centre, pixels from the left edge
    y: float  # Centre, pixels from the top edge
    r: float  # Radius of the circle around it, pixels
    angle: float = 0.0  # Radians
    aspect: float = 1.0  # Length over width, for crates


@dataclass(frozen=True)
class Canvas:
    """What painting changes in place."""

    photo: Picture  # (H, W, 3) float32, RGB in [0, 1]
    rows: npt.NDArray[np.uint8]  # (H, W) uint8, the row of the segment on top; 0 = unlabelled
    # (H, W) float32, noise of unit deviation, the texture of all things.
    grain: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Local:
    """Coordinates around a thing's centre, in radii: (x, y) upright, (u, v) turned with it."""

    x: Plane
    y: Plane
    u: Plane
    v: Plane
    aspect: float


def _ball(p: _Local) -> tuple[Plane, Plane, Plane]:
    radius = np.hypot(p.u, p.v)
    panels = np.clip(0.5 + 4 * np.sin(3 * np.arctan2(p.v, p.u)) * radius, 0, 1)
    depth = np.sqrt(np.clip(1 - radius * radius, 0, 1))
    return radius - 1, panels, 0.5 + 0.6 * np.clip(0.75 * depth - 0.35 * p.x - 0.5 * p.y, 0, 1)


def _crate(p: _Local) -> tuple[Plane, Plane, Plane]:
    half = 1 / np.hypot(1, p.aspect)
    distance = np.maximum(abs(p.u) - p.aspect * half, abs(p.v) - half)
    frame = np.clip((distance + 0.25 * half) * 30, 0, 1)
    boards = np.clip(4 * np.cos(3 * np.pi * p.v / half) + 4.3, 0.55, 1)
    return distance, frame, boards * (0.95 + 0.08 * np.sin(25 * p.v + 3 * np.sin(4 * p.u)))


def _tent(p: _Local) -> tuple[Plane, Plane, Plane]:
    distance = np.maximum(p.v - 0.5, 0.866 * abs(p.u) - 0.5 * p.v - 0.5)
    stripes = np.clip(0.5 + 3 * np.cos(9 * p.u / np.maximum(p.v + 1.15, 0.1)), 0, 1)
    return distance, stripes, np.where(p.u > 0.12 * p.v, 0.72, 1.0) - 0.12 * p.v


def _ring(p: _Local) -> tuple[Plane, Plane, Plane]:
    radius = np.hypot(p.u, p.v)
    across = (radius - 0.73) / 0.27
    bands = np.clip(5 * np.sin(4 * np.arctan2(p.v, p.u)) - 1.5, 0, 1)
    tube = np.sqrt(np.clip(1 - across * across, 0, 1))
    return (abs(across) - 1) * 0.27, bands, 0.5 + 0.5 * tube - 0.12 * (p.x + p.y) * across


def _star(p: _Local) -> tuple[Plane, Plane, Plane]:
    radius = np.hypot(p.u, p.v)
    fold = np.mod(np.arctan2(p.v, p.u), 2 * np.pi / 5) - np.pi / 5  # 0 at a notch
    # From the tip (1, 0) to the notch at radius 0.5 the edge's unit normal is (0.442, 0.897).
    turn = np.pi / 5 - abs(fold)
    distance = radius * (0.4421 * np.cos(turn) + 0.8970 * np.sin(turn)) - 0.4421
    return distance, np.clip(1 - 1.3 * radius, 0, 1), np.where(fold > 0, 1.0, 0.72)


def _unknown(p: _Local) -> tuple[Plane, Plane, Plane]:
    slant, half = 0.866 * p.v, p.u / 2
    distance = np.maximum(abs(p.u), np.maximum(abs(half + slant), abs(half - slant))) - 0.866
    checks = np.clip(0.5 + 4 * np.sin(7 * p.u) * np.sin(7 * p.v), 0, 1)
    return distance, checks, 0.9 - 0.2 * p.y


@dataclass(frozen=True)
class _Thing:
    """A form and its paint: hues to choose from, saturation and value of two colours."""

    form: Callable[[_Local], tuple[Plane, Plane, Plane]]
    """Signed distance in radii, blend of the two colours in [0, 1], brightness."""
    hues: tuple[float, ...]
    first: tuple[float, float]
    second: tuple[float, float]


_THINGS = {
    "ball": _Thing(_ball, (0.98, 0.60, 0.40), (0.80, 0.85), (0.08, 0.95)),
    "crate": _Thing(_crate, (0.07, 0.10), (0.60, 0.75), (0.65, 0.50)),
    "tent": _Thing(_tent, (0.78, 0.48, 0.92), (0.60, 0.70), (0.15, 0.95)),
    "ring": _Thing(_ring, (0.02, 0.07), (0.85, 0.95), (0.05, 0.95)),
    "star": _Thing(_star, (0.14, 0.90), (0.75, 0.95), (0.35, 1.00)),
    "unknown": _Thing(_unknown, (0.0, 0.60), (0.10, 0.35), (0.05, 0.80)),
}


def paint_thing(
    rng: np.random.Generator, canvas: Canvas, look: Look, shape: Shape, *, row: int
) -> None:
    """Paints one thing over the canvas: soft edge and shadow in the photo, a hard edge in `rows`.

    The shape may reach beyond the image; `row` is written wherever it covers half a pixel or more.
    """
    height, width = canvas.rows.shape
    reach = 1.2 * shape.r + 1.5  # the shape, its soft edge and its shadow
    x0, x1 = max(0, int(shape.x - reach)), min(width, int(shape.x + reach) + 1)
    y0, y1 = max(0, int(shape.y - reach)), min(height, int(shape.y + reach) + 1)
    if x0 >= x1 or y0 >= y1:
        return
    here = np.s_[y0:y1, x0:x1]
    radius = np.float32(shape.r)
    x = (np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - shape.x)) / radius
    y = (np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - shape.y)) / radius
    cos, sin = np.float32(np.cos(shape.angle)), np.float32(np.sin(shape.angle))
    thing = _THINGS[look]
    distance, blend, light = thing.form(
        _Local(x, y, cos * x + sin * y, cos * y - sin * x, shape.aspect)
    )

    hue = (rng.choice(thing.hues) + rng.normal(0, 0.015)) % 1
    dye, gloss = rng.uniform(0.8, 1.15), rng.uniform(0.8, 1.08)
    first = _rgb(hue, thing.first[0] * dye, thing.first[1] * gloss)
    second = _rgb(hue, thing.second[0], thing.second[1] * gloss)
    light = light + 0.022 * canvas.grain[here]
    colour = _mixed(first, second, blend) * light[..., None]

    patch = canvas.photo[here]
    shadow = np.clip(1 - 6 * distance, 0, 1) * np.clip(0.55 + 0.45 * y, 0, 1)
    patch *= (1 - 0.45 * shadow)[..., None]
    cover = np.clip(0.5 - distance * radius, 0, 1)
    patch += cover[..., None] * (colour - patch)
    canvas.rows[here][cover >= 0.5] = row


def _rgb(hue: float, saturation: float, value: float) -> npt.NDArray[np.float32]:
    """(3,) float32."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1.0), value), np.float32)


def _mixed(
    first: npt.NDArray[np.float32], second: npt.NDArray[np.float32], blend: Plane
) -> Picture:
    """(h, w, 3): from colour `first` to `second`, (3,) each, as `blend` (h, w) goes from 0 to 1."""
    return first + (second - first) * blend.astype(np.float32)[..., None]


def _smooth(
    rng: np.random.Generator, height: int, width: int, lines: float, columns: float
) -> npt.NDArray[np.float32]:
    """(height, width) noise of about unit deviation, smooth between `lines` x `columns` knots."""
    knots = rng.standard_normal((2 + int(lines), 2 + int(columns)), dtype=np.float32)
    return np.asarray(cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC))


def _sky(rng: np.random.Generator, height: int, width: int, unit: float) -> Picture:
    zenith, haze = (
        (_rgb(0.60, 0.66, 0.84), _rgb(0.57, 0.20, 0.98)),
        (_rgb(0.58, 0.55, 0.86), _rgb(0.13, 0.07, 0.95)),
        (_rgb(0.65, 0.46, 0.70), _rgb(0.06, 0.36, 0.98)),
    )[int(rng.integers(3))]
    fall = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    sky = _mixed(zenith, haze, np.broadcast_to(fall, (height, width)))
    clouds = _smooth(rng, height, width, height / (14 * unit), width / (40 * unit))
    clouds += 0.4 * _smooth(rng, height, width, height / (5 * unit), width / (10 * unit))
    cover = 0.85 * (1 - np.exp(-np.clip(clouds - rng.uniform(0.2, 0.9), 0, None)))
    sky += cover[..., None] * (np.float32(0.98) - sky)
    return sky


def _wall(rng: np.random.Generator, height: int, width: int, unit: float) -> Picture:
    tall = unit * rng.uniform(7, 10)
    y = np.arange(height, dtype=np.float32)[:, None] / np.float32(tall)
    line = y.astype(np.int32)
    x = np.arange(width, dtype=np.float32)[None, :] / np.float32(2.2 * tall)
    x = x + np.float32(0.5) * (line % 2).astype(np.float32)
    column = x.astype(np.int32)
    joint = np.maximum(abs(y - line - 0.5), 2.2 * abs(x - column - 0.5) - 0.6)
    joint = np.clip((joint - 0.4) * 12, 0, 1).astype(np.float32)
    tint = rng.uniform(0.78, 1.12, (int(line.max()) + 1, int(column.max()) + 1))
    shade = tint[line, column] + 0.04 * _smooth(rng, height, width, height / 2, width / 2)
    wall = _rgb(rng.uniform(0, 0.05), rng.uniform(0.3, 0.5), 0.68) * shade[..., None]
    return np.asarray(wall + joint[..., None] * (0.74 - wall), np.float32)


def _grass(rng: np.random.Generator, height: int, width: int, unit: float) -> Picture:
    hue = rng.uniform(0.23, 0.33)
    blades = _smooth(rng, height, width, height / (6 * unit), width / (1.3 * unit))
    meadow = 0.45 + 0.2 * _smooth(rng, height, width, 3, 5) + 0.22 * blades
    return _mixed(_rgb(hue, 0.65, 0.42), _rgb(hue - 0.03, 0.6, 0.68), np.clip(meadow, 0, 1.2))


def _water(rng: np.random.Generator, height: int, width: int, unit: float) -> Picture:
    hue = rng.uniform(0.5, 0.58)
    y = np.arange(height, dtype=np.float32)[:, None] / np.float32(unit)
    # The square root brings waves closer together towards the horizon.
    phase = 14 * np.sqrt(y + 4) + 2.2 * _smooth(rng, height, width, 4, 5)
    foam = _smooth(rng, height, width, height / (3 * unit), 8)
    waves = 0.32 + 0.25 * np.sin(phase) + 0.12 * foam
    return _mixed(_rgb(hue, 0.8, 0.42), _rgb(hue - 0.02, 0.35, 0.85), np.clip(waves, 0, 1))


_TEXTURES = {"sky": _sky, "wall": _wall, "grass": _grass, "water": _water}
"""Textures of stuff, called with a generator, a height and width in pixels, and a unit.

The unit is the pixels that the texture takes for one, so that it grows with the picture. The result
is a `Picture`, in [0, 1] but for a little overshoot.
"""


def paint_stuff(
    rng: np.random.Generator, height: int, width: int, unit: float
) -> tuple[Canvas, list[Look]]:
    """Paints bands of stuff with wavy borders; returns them and the look of rows 1, 2, ..."""
    looks = ["sky" if rng.random() < 0.7 else "wall"]
    looks += ["grass", "water"] if rng.random() < 0.5 else ["water", "grass"]
    cuts = [rng.uniform(0.28, 0.4), rng.uniform(0.6, 0.75)]
    if rng.random() < 0.8:
        looks, cuts = looks[:2], [rng.uniform(0.35, 0.6)]
    across = np.linspace(0, 1, width, dtype=np.float32)
    borders = [np.zeros(width, np.float32)]
    for cut in cuts:
        wave = np.sin(across * rng.uniform(3, 9) + rng.uniform(0, 6))
        wave += 0.4 * np.sin(across * rng.uniform(12, 25) + rng.uniform(0, 6))
        borders.append(height * (cut + rng.uniform(0.01, 0.045) * wave).astype(np.float32))
    borders.append(np.full(width, height, np.float32))

    photo: Picture = np.zeros((height, width, 3), np.float32)
    rows = np.ones((height, width), np.uint8)
    down = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
    for row, (look, upper, lower) in enumerate(zip(looks, borders, borders[1:], strict=False), 1):
        first, last = max(0, int(upper.min()) - 1), min(height, int(lower.max()) + 2)
        stuff = _TEXTURES[look](rng, last - first, width, unit)
        cover = np.clip(down[first:last] - upper + np.float32(0.5), 0, 1)
        photo[first:last] += cover[..., None] * (stuff - photo[first:last])
        rows[first:last][cover >= 0.5] = row
    return Canvas(photo, rows, rng.standard_normal((height, width), dtype=np.float32)), looks


def inside_patch(patch: Shape, height: int, width: int) -> npt.NDArray[np.bool_]:
    """(H, W) bool: inside a circle with a wavy outline."""
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(patch.x)
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(patch.y)
    turn = np.arctan2(y, x) + patch.angle
    limit = 1 + 0.15 * np.sin(3 * turn) + 0.1 * np.sin(5 * turn + patch.angle)
    return np.asarray(np.hypot(x, y) < patch.r * limit)
