"""The report as one HTML file: no other files, no network, readable without JavaScript."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from panoptic_cache.evaluate.metric.pq import GroupPQ, PQResult
from panoptic_cache.evaluate.report.charts import confusion_table, measure_list, size_chart
from panoptic_cache.evaluate.report.page_assets import SCRIPT, STYLE
from panoptic_cache.evaluate.report.pictures import BOTH, FALSE, MISSED, Figure, Gallery
from panoptic_cache.evaluate.report.tables import CATEGORY_COLUMNS, category_table
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures.colours import segment_colours

PAGE_NAME = "report.html"
HEADS = """By the PQ of the image alone. The heads are shown raw, before decoding: the semantic
head in the colours of the categories; the instance head in those of the centroids that it points
to, red growing to the right, green downwards, and black where it sees no instance. Click to
enlarge."""


def write_report(
    folder: Path,
    result: PQResult,
    categories: Sequence[Category],
    gallery: Gallery,
    *,
    title: str = "Panoptic quality",
    facts: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `report.html` whole or not at all; makes the folder.

    Args:
        folder: Where to.
        result: The metric.
        categories: By label.
        gallery: The best and the worst images.
        title: The page's headline.
        facts: What to say below it, such as checkpoint, split and time.
        values: What stands beside PQ, see `Scores.to_json`.

    Returns:
        The page's path.

    Raises:
        InputError: No space or no permission.
    """
    text = page(
        result,
        categories,
        gallery.best,
        gallery.worst,
        title=title,
        facts=facts or {},
        values=values,
    )
    storage = Storage(str(folder))
    storage.create()
    storage.write(PAGE_NAME, text.encode())
    return folder / PAGE_NAME


def page(
    result: PQResult,
    categories: Sequence[Category],
    best: Sequence[Figure],
    worst: Sequence[Figure],
    *,
    title: str,
    facts: Mapping[str, str],
    values: Mapping[str, Any] | None = None,
) -> str:
    """The page's HTML; see `write_report`."""
    groups = {"all categories": result.all, "things": result.things, "stuff": result.stuff}
    lines = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<dl class="facts">{lines}</dl>
<section class="scores">{"".join(_score(name, group) for name, group in groups.items())}</section>
<h2 id="categories">Categories</h2>
<p class="soft">In percent, as the official evaluator counts; a category without any segment enters
no mean. Click a heading to sort.</p>
{_table(result, categories)}
{_measures(values, categories) if values else ""}
{_figures("Best images", best, HEADS)}
{_figures("Worst images", worst)}
</main>
<dialog></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _measures(values: Mapping[str, Any], categories: Sequence[Category]) -> str:
    return f"""<h2 id="beside">Beside PQ</h2>
{measure_list(values)}
<h2 id="sizes">Things by size</h2>
<p class="soft">Mean over the true instances of the IoU with the predicted thing that fits best,
whatever its category; by the side of the square of their area, with the number of instances.</p>
{size_chart(values["sizes"])}
<h2 id="confusion">Confusions</h2>
<p class="soft">Segments found with an IoU above 0.5, but under another category; the share is of
all segments of the true one.</p>
{confusion_table(values["confusion"], categories)}"""


def _score(name: str, group: GroupPQ | None) -> str:
    details = '<span class="soft">undefined: no segment</span>'
    if group is not None:
        parts = (
            ("SQ", f"{group.sq:.1%}"),
            ("RQ", f"{group.rq:.1%}"),
            ("categories", str(group.n)),
        )
        details = "".join(f'<span><span class="soft">{k}</span>{v}</span>' for k, v in parts)
    value = "-" if group is None else f"{100 * group.pq:.1f}"
    return f'<div class="score">PQ, {name}<b>{value}</b>{details}</div>'


def _table(result: PQResult, categories: Sequence[Category]) -> str:
    head = "".join(f"<th scope=col><button>{name}</button></th>" for name in CATEGORY_COLUMNS)
    colours = segment_colours([c.label for c in categories], [c.isthing for c in categories])[1:]
    body = "".join(
        _row(cells, f"rgb{tuple(colour.tolist())}")
        for cells, colour in zip(category_table(result, categories), colours, strict=True)
    )
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str], colour: str) -> str:
    name, kind, pq, *rest = cells
    # Undefined sorts below 0.
    value = ["-1" if cell == "-" else cell for cell in (pq, *rest)]
    return (
        f"<tr{' class=none' if pq == '-' else ''}>"
        f'<td data-v="{escape(name)}"><i class="dot" style="background:{colour}"></i>{escape(name)}'
        f'</td><td data-v="{kind}">{kind}</td>'
        f'<td class="bar" style="--v:{max(0.0, float(value[0]))}" data-v="{value[0]}">{pq}</td>'
        + "".join(f'<td data-v="{v}">{cell}</td>' for v, cell in zip(value[1:], rest, strict=True))
        + "</tr>"
    )


def _figures(title: str, figures: Iterable[Figure], note: str = "") -> str:
    articles = "".join(_article(figure) for figure in figures)
    note = note and f'<p class="soft">{note}</p>'
    return f"<h2>{title}</h2>{note}{articles}" if articles else ""


def _article(figure: Figure) -> str:
    keys = {"missed": MISSED, "false": FALSE, "both": BOTH}
    legend = " ".join(
        f'<span class="key"><i class="dot" style="background:rgb{colour}"></i>{name}</span>'
        for name, colour in keys.items()
    )
    pictures = "".join(
        f'<figure><img loading="lazy" alt="{escape(f"{figure.title}: {name}")}" '
        f'src="data:image/jpeg;base64,{b64encode(data).decode()}">'
        f"<figcaption>{name} {legend if name == 'errors' else ''}</figcaption></figure>"
        for name, data in figure.pictures
    )
    return (
        f'<article><div class="head"><h3>{escape(figure.title)}</h3><span>PQ {figure.pq:.1%}</span>'
        f'<span class="soft">{escape(figure.summary)}</span></div>'
        f'<div class="pictures">{pictures}</div></article>'
    )
