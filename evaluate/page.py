"""The report as one HTML file: no other files, no network, readable without JavaScript."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from evaluate.gallery import Figure, Gallery
from evaluate.pq import GroupPQ, PQResult
from evaluate.report import BOTH, CATEGORY_COLUMNS, FALSE, MISSED, category_table
from pipeline.coco import Category
from pipeline.draw import segment_colours
from pipeline.storage import Storage

PAGE_NAME = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #687079; --line: #e3e6e9;
  --paper: #fdfdfc; --card: #fff; --bar: #cfe0ea }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #98a0a8; --line: #2d3238;
  --paper: #15181b; --card: #1b1f23; --bar: #2b4759 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums }
main { max-width: 1240px; margin: 0 auto; padding: 56px 32px 96px }
h1 { font-size: 32px; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; margin: 0 }
h2 { font-size: 20px; font-weight: 600; letter-spacing: -.01em; margin: 64px 0 4px }
h3 { font-size: 15px; font-weight: 600; margin: 0; overflow-wrap: anywhere }
p { margin: 0; max-width: 74ch } .soft { color: var(--soft) }
.facts { display: flex; flex-wrap: wrap; gap: 12px 40px; margin: 20px 0 0 }
dt { color: var(--soft); font-size: 13px } dd { margin: 0; overflow-wrap: anywhere }
.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr));
  gap: 20px; margin: 40px 0 0 }
.score { border-top: 2px solid var(--ink); padding-top: 12px }
.score b { display: block; font-size: 56px; line-height: 1.1; font-weight: 300;
  letter-spacing: -.03em }
.score span { margin-right: 18px } .score .soft { margin-right: 6px }
.table { max-height: 620px; overflow: auto; border-block: 1px solid var(--line); margin-top: 16px }
table { border-collapse: collapse; width: 100% }
th, td { text-align: right; padding: 5px 12px; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
th { position: sticky; top: 0; background: var(--paper); font-weight: 400; font-size: 13px;
  color: var(--soft); box-shadow: 0 1px var(--line); padding: 0; z-index: 1 }
th button { all: unset; cursor: pointer; padding: 8px 12px; box-sizing: border-box }
th button:focus-visible { outline: 2px solid; outline-offset: -3px }
th[aria-sort] { color: var(--ink) }
th[aria-sort=descending] button::after { content: " \\2193" }
th[aria-sort=ascending] button::after { content: " \\2191" }
tr + tr td { border-top: 1px solid var(--line) }
tr.none { color: var(--soft) }
td.bar { background: linear-gradient(var(--bar) 0 0) left/calc(var(--v)*.68%) 18px no-repeat;
  min-width: 190px }
i.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 9px }
article { margin-top: 28px; padding: 18px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px }
.head { display: flex; gap: 6px 20px; align-items: baseline; flex-wrap: wrap }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; margin-top: 14px }
figure { margin: 0 } figcaption { font-size: 13px; color: var(--soft); margin-top: 2px }
img { display: block; width: 100%; height: auto; border-radius: 4px; cursor: zoom-in }
dialog { border: 0; padding: 0; background: none; max-width: 96vw; max-height: 96vh }
dialog img { width: auto; min-width: min(92vw, 120vh); max-height: 94vh; object-fit: contain;
  cursor: zoom-out }
dialog::backdrop { background: #000c }
@media (max-width: 760px) { .pictures { grid-template-columns: repeat(2, 1fr) }
  main { padding: 32px 16px } }
@media print { .table { max-height: none } article { break-inside: avoid } }
"""

_SCRIPT = """
for (const th of document.querySelectorAll("th")) th.firstChild.onclick = () => {
  const now = th.getAttribute("aria-sort"), down = now ? now === "ascending" : th.cellIndex > 1;
  const body = th.closest("table").tBodies[0], key = row => row.cells[th.cellIndex].dataset.v;
  const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b))
    : key(a) - key(b);
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
};
const zoom = document.querySelector("dialog");
for (const img of document.querySelectorAll("article img")) img.onclick = () => {
  zoom.replaceChildren(img.cloneNode()); zoom.showModal();
};
zoom.onclick = () => zoom.close();
"""


def write_report(
    folder: Path,
    result: PQResult,
    categories: Sequence[Category],
    gallery: Gallery,
    *,
    title: str = "Panoptic quality",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes `report.html` whole or not at all; makes the folder.

    Args:
        folder: Where to.
        result: The metric.
        categories: By label.
        gallery: The best and the worst images.
        title: The page's headline.
        facts: What to say below it, such as checkpoint, split and time.

    Returns:
        The page's path.

    Raises:
        InputError: No space or no permission.
    """
    text = page(result, categories, gallery.best(), gallery.worst(), title=title, facts=facts or {})
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
<style>{_STYLE}</style>
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
{_figures("Best images", best)}
{_figures("Worst images", worst)}
</main>
<dialog></dialog>
<script>{_SCRIPT}</script>
</body>
</html>
"""


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


def _figures(title: str, figures: Iterable[Figure]) -> str:
    articles = "".join(_article(figure) for figure in figures)
    return f"<h2>{title}</h2>{articles}" if articles else ""


def _article(figure: Figure) -> str:
    keys = {"missed": MISSED, "false": FALSE, "both": BOTH}
    legend = " ".join(
        f'<i class="dot" style="background:rgb{colour};margin:0 3px 0 8px"></i>{name}'
        for name, colour in keys.items()
    )
    pictures = "".join(
        f'<figure><img loading="lazy" alt="{escape(f"{figure.title}: {name}")}" '
        f'src="data:image/jpeg;base64,{b64encode(data).decode()}">'
        f"<figcaption>{name}{legend if name == 'errors' else ''}</figcaption></figure>"
        for name, data in figure.pictures
    )
    return (
        f'<article><div class="head"><h3>{escape(figure.title)}</h3><span>PQ {figure.pq:.1%}</span>'
        f'<span class="soft">{escape(figure.summary)}</span></div>'
        f'<div class="pictures">{pictures}</div></article>'
    )
