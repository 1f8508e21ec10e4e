"""The report as one HTML file: no other files, no network, readable without JavaScript.

`template.html` holds the markup, the style and the script; this module gives it its values.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from panoptic_cache.evaluate.report.pictures import BOTH, FALSE, MISSED, Figure
from panoptic_cache.evaluate.report.tables import measures, percent, size_name
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures import segment_colours

PAGE_NAME = "report.html"
CONFUSIONS = 12
"""Rows in the table of confusions."""


def write_report(
    folder: Path,
    values: Mapping[str, Any],
    categories: Sequence[Category],
    *,
    best: Sequence[Figure],
    worst: Sequence[Figure],
    title: str,
    facts: Mapping[str, str],
) -> Path:
    """Writes `report.html` whole or not at all, makes its folder, and returns its path.

    `values` are all measures as of `Scores.to_json`. `facts` are shown below the title, such as the
    number of images. Raises InputError where it cannot be written.
    """
    colours = segment_colours([c.label for c in categories], [c.isthing for c in categories])[1:]
    text = (
        environment()
        .get_template("template.html")
        .render(
            title=title,
            facts=facts,
            groups={
                "all categories": values["All"],
                "things": values["Things"],
                "stuff": values["Stuff"],
            },
            categories=[
                (category, colour, values["per_class"][str(category.id)])
                for category, colour in zip(categories, colours.tolist(), strict=True)
            ],
            measures=measures(values),
            sizes=filled_sizes(values["sizes"]),
            confusions=confusions(values["confusion"], categories),
            best=best,
            worst=worst,
            errors={"missed": MISSED, "false": FALSE, "both": BOTH},
        )
    )
    storage = Storage(str(folder))
    storage.create()
    storage.write(PAGE_NAME, text.encode(errors="replace"))  # of names that are no UTF-8
    return folder / PAGE_NAME


def environment(*folders: Path) -> Environment:
    """Templates of these folders and of this one, which has the style of all pages."""
    made = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,  # names of files and categories come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "rgb": _rgb, "base64": _base64}
    return made


def filled_sizes(sizes: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float | None]]:
    """Name, instances and mean IoU, from the first to the last size that has instances."""
    filled = [at for at, row in enumerate(sizes) if row["n"]]
    rows = sizes[filled[0] : filled[-1] + 1] if filled else ()
    return [(size_name(row), row["n"], row["iou"]) for row in rows]


def confusions(
    counts: Mapping[str, Mapping[str, int]], categories: Sequence[Category]
) -> list[tuple[str, str, int, float]]:
    """The most frequent confusions of two categories, see `Breakdown.to_json`.

    Names of the true and of the found one, segments, and their share of the true one's.
    """
    names = {str(category.id): category.name for category in categories}
    found = [
        (names[true], names[other], count, count / sum(row.values()))
        for true, row in counts.items()
        for other, count in row.items()
        if other not in {true, "none"}
    ]
    return sorted(found, key=lambda row: (-row[2], -row[3]))[:CONFUSIONS]


def _rgb(colour: Sequence[int]) -> str:
    return f"rgb({', '.join(map(str, colour))})"


def _base64(data: bytes) -> Markup:
    return Markup(b64encode(data).decode())  # nothing in it to escape
