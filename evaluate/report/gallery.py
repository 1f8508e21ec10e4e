"""Figures of the best and of the worst images, for the HTML page; memory stays bounded."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from panoptic_cache.evaluate.report.compare import compare
from panoptic_cache.evaluate.report.panels import ImageView, panels
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures.colours import encode_picture


@dataclass(frozen=True, slots=True)
class Figure:
    """One image of the page.

    Attributes:
        title: Such as the file name.
        pq: Of the image.
        summary: What was found, missed and false, in words.
        pictures: Caption and JPEG bytes of each picture.
    """

    title: str
    pq: float
    summary: str
    pictures: tuple[tuple[str, bytes], ...]


class Gallery:
    """Keeps figures of the best and of the worst images, as JPEGs: a few hundred kB each.

    Attributes:
        categories: By label.
        limit: Figures of either kind.
    """

    def __init__(self, categories: Sequence[Category], limit: int = 6) -> None:
        self.categories = tuple(categories)
        self.limit = limit
        self._added = 0
        # Heaps whose first entry is the next to go; an earlier image wins a tie.
        self._best: list[tuple[float, int, Figure]] = []
        self._worst: list[tuple[float, int, Figure]] = []

    def wants(self, pq: float | None) -> bool:
        """Whether an image of this PQ would be kept; saves making its view."""
        if pq is None or self.limit == 0:
            return False
        return len(self._best) < self.limit or pq > self._best[0][0] or -pq > self._worst[0][0]

    def add(self, view: ImageView) -> None:
        """Keeps the image if it is among the best or the worst so far."""
        self._added += 1
        if view.pq is None or not self.wants(view.pq):
            return
        figure = make_figure(view, self.categories)
        for heap, key in ((self._best, view.pq), (self._worst, -view.pq)):
            heapq.heappush(heap, (key, -self._added, figure))
            if len(heap) > self.limit:
                heapq.heappop(heap)

    def best(self) -> tuple[Figure, ...]:
        """The best images, best first."""
        return tuple(figure for _, _, figure in sorted(self._best, reverse=True))

    def worst(self) -> tuple[Figure, ...]:
        """The worst images that are not among the best, worst first."""
        best = {order for _, order, _ in self._best}
        return tuple(
            figure for _, order, figure in sorted(self._worst, reverse=True) if order not in best
        )


def make_figure(view: ImageView, categories: Sequence[Category]) -> Figure:
    """Draws an image that has a PQ."""
    summary = ""
    if view.truth is not None:
        found = compare(view.truth, view.prediction)
        total = len(found.matches) + len(found.missed)
        parts = [f"{len(found.matches)} of {total} segments found"]
        for name, rows, labels in (
            ("missed", found.missed, view.truth.labels),
            ("false", found.false, view.prediction.labels),
        ):
            if rows:
                parts.append(f"{name}: {_count(categories[labels[row]].name for row in rows)}")
        summary = "; ".join(parts)
    return Figure(
        view.title,
        view.pq or 0.0,
        summary,
        tuple((name, encode_picture(tile, ".jpg")) for name, tile in panels(view, categories)),
    )


def _count(names: Iterable[str]) -> str:
    counts = Counter(names).most_common()
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts)
