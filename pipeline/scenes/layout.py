"""Where the things of a synthetic scene are: pure geometry, decided before painting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from panoptic_cache.pipeline.scenes.looks import THINGS, Look, Shape

_COUNTS = {2: 0.2, 3: 0.28, 4: 0.24, 5: 0.14, 6: 0.08, 7: 0.06}
"""Probability of each number of things in a scene."""


@dataclass(frozen=True)
class Group:
    """The shapes of one segment: one, or several for a crowd."""

    look: Look
    shapes: tuple[Shape, ...]
    iscrowd: bool = False


@dataclass(frozen=True)
class _Frame:
    """Size of the image in pixels, and the generator of all choices."""

    rng: np.random.Generator
    height: int
    width: int

    @property
    def side(self) -> int:
        return min(self.height, self.width)

    def spot(self, margin: float) -> tuple[float, float]:
        """A point (x, y) at least `margin` pixels from the border."""
        x = self.rng.uniform(margin, self.width - margin)
        return x, self.rng.uniform(margin, self.height - margin)

    def thing(self, look: Look, spot: tuple[float, float], radius: float) -> Shape:
        """A shape in a typical pose: tents stand about upright, other things are turned freely."""
        tent = look is Look.TENT
        turn = self.rng.normal(0, 0.3) if tent else self.rng.uniform(0, 2 * np.pi)
        return Shape(*spot, radius, float(turn))

    def look(self, *looks: Look) -> Look:
        """One of the given looks, or of all things."""
        choice = looks or THINGS
        return choice[int(self.rng.integers(len(choice)))]


def lay_out(
    rng: np.random.Generator, special: str, height: int, width: int
) -> tuple[list[Group], list[Shape]]:
    """Places the things of a scene of `height` x `width` pixels.

    `special` is one of `SPECIAL_KINDS`, `patch`, or anything else for a plain scene. Returns the
    things back to front, with the special ones last so that nothing hides them, and the patches of
    stuff to leave unlabelled.
    """
    frame = _Frame(rng, height, width)
    place = SPECIAL_KINDS.get(special)
    front = place(frame) if place else []
    patches = [_patch(frame)] if special == "patch" else []
    taken = [shape for group in front for shape in group.shapes] + patches
    count = int(rng.choice(list(_COUNTS), p=list(_COUNTS.values())))
    things = []
    for _ in range(max(2, count - len(front))):
        look, radius = frame.look(), frame.side * (0.08 + 0.2 * rng.random() ** 1.2)
        spot = _free_spot(frame, radius, taken)
        if spot is None:
            continue
        shape = frame.thing(look, spot, radius)
        if look is Look.CRATE:
            shape = Shape(shape.x, shape.y, shape.r, shape.angle, rng.uniform(1, 2))
        taken.append(shape)
        things.append(Group(look, (shape,)))
    things.sort(key=lambda group: group.shapes[0].y)  # lower in the image is nearer
    return things + front, patches


def _free_spot(frame: _Frame, radius: float, taken: list[Shape]) -> tuple[float, float] | None:
    """A centre (x, y) that leaves more than half of a smaller neighbour visible, or None."""
    rng, margin = frame.rng, 0.8 * radius
    peers = [other for other in taken if other.r > radius / 3]
    for _ in range(24):
        if peers and rng.random() < 0.4:  # often next to another thing, so that segments overlap
            other = peers[int(rng.integers(len(peers)))]
            reach, turn = 0.85 * (other.r + radius), rng.uniform(0, 2 * np.pi)
            x, y = other.x + reach * np.cos(turn), other.y + reach * np.sin(turn)
        else:
            x, y = frame.spot(margin)
        if (
            margin <= x <= frame.width - margin
            and margin <= y <= frame.height - margin
            and all(
                np.hypot(x - o.x, y - o.y) > 0.95 * max(radius, o.r) + 0.2 * min(radius, o.r)
                for o in taken
            )
        ):
            return float(x), float(y)
    return None


def _unknown(frame: _Frame) -> list[Group]:
    """An object of no category."""
    radius = frame.side * frame.rng.uniform(0.13, 0.2)
    return [Group(Look.UNKNOWN, (frame.thing(Look.UNKNOWN, frame.spot(radius), radius),))]


def _patch(frame: _Frame) -> Shape:
    """A patch of stuff that is left unlabelled."""
    radius = frame.side * frame.rng.uniform(0.16, 0.24)
    return Shape(*frame.spot(radius), radius, frame.rng.uniform(0, 2 * np.pi))


def _crowd(frame: _Frame) -> list[Group]:
    """Ten to twenty small things of one look, in lines, as one segment."""
    rng, look, radius = frame.rng, frame.look(), max(2.0, 0.042 * frame.side)
    columns, lines = int(rng.integers(5, 8)), int(rng.integers(2, 4))
    x, y = rng.uniform(0.35, 0.65) * frame.width, rng.uniform(0.45, 0.75) * frame.height
    shapes = []
    for i in range(columns * lines):
        right = 2.5 * (i % columns - (columns - 1) / 2) + rng.uniform(-0.4, 0.4)
        down = 2.5 * (i // columns - (lines - 1) / 2) + rng.uniform(-0.4, 0.4)
        spot = x + radius * right, y + radius * down
        shapes.append(frame.thing(look, spot, radius * rng.uniform(0.85, 1.15)))
    return [Group(look, tuple(shapes), iscrowd=True)]


def _concentric(frame: _Frame) -> list[Group]:
    """Two things with the same centre: their centroids do not tell them apart."""
    radius = frame.side * frame.rng.uniform(0.2, 0.28)
    spot = frame.spot(radius)
    back, front, part = (
        (Look.RING, Look.BALL, 0.4),
        (Look.RING, Look.BALL, 0.4),
        (Look.CRATE, Look.STAR, 0.55),
        (Look.BALL, Look.CRATE, 0.5),
    )[int(frame.rng.integers(4))]
    return [
        Group(back, (frame.thing(back, spot, radius),)),
        Group(front, (frame.thing(front, spot, part * radius),)),
    ]


def _tiny(frame: _Frame) -> list[Group]:
    """Two things a few pixels wide, centred on a pixel so that even the thinnest covers one."""
    groups = []
    for _ in range(2):
        look, radius = frame.look(), max(2.0, frame.side * frame.rng.uniform(0.017, 0.023))
        x, y = frame.spot(4 * radius)
        groups.append(Group(look, (frame.thing(look, (int(x) + 0.5, int(y) + 0.5), radius),)))
    return groups


def _cut(frame: _Frame) -> list[Group]:
    """A large thing, about half of it outside the image."""
    look, radius = frame.look(), frame.side * frame.rng.uniform(0.2, 0.28)
    x, y = frame.spot(radius)
    out = frame.rng.uniform(-0.25, 0.25) * radius
    border = int(frame.rng.integers(4))
    spot = (border * frame.width + out, y) if border < 2 else (x, (border - 2) * frame.height + out)
    return [Group(look, (frame.thing(look, spot, radius),))]


def _split(frame: _Frame) -> list[Group]:
    """A thing that a plank in front of it cuts in two."""
    look, radius = frame.look(Look.BALL, Look.CRATE), frame.side * frame.rng.uniform(0.2, 0.26)
    x, y = frame.spot(1.3 * radius)
    turn, aspect = frame.rng.uniform(0, np.pi), frame.rng.uniform(4.5, 6)
    return [
        Group(look, (frame.thing(look, (x, y), radius),)),
        Group(Look.CRATE, (Shape(x, y, 1.3 * radius, turn, aspect),)),
    ]


SPECIAL_KINDS: dict[str, Callable[[_Frame], list[Group]]] = {
    "unknown": _unknown,
    "crowd": _crowd,
    "concentric": _concentric,
    "tiny": _tiny,
    "cut": _cut,
    "split": _split,
}
