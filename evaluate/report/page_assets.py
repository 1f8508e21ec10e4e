"""The report's style sheet and its script, which a page carries inside."""

from __future__ import annotations

STYLE = """
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
.small { max-width: 640px }
.chart { display: block; width: 100%; max-width: 760px; height: auto; margin-top: 18px }
.chart text { fill: var(--ink); font-size: 13px; text-anchor: middle }
.chart .y, .chart .n { fill: var(--soft); font-size: 12px } .chart .y { text-anchor: end }
.chart path { stroke: var(--line) } .chart rect { fill: var(--bar) }
article { margin-top: 28px; padding: 18px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px }
.head { display: flex; gap: 6px 20px; align-items: baseline; flex-wrap: wrap }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; margin-top: 14px }
figure { margin: 0 } figcaption { font-size: 13px; color: var(--soft); margin-top: 2px }
.key { white-space: nowrap; margin-left: 8px } .key .dot { margin-right: 4px }
img { display: block; width: 100%; height: auto; border-radius: 4px; cursor: zoom-in }
dialog { border: 0; padding: 0; background: none; max-width: 96vw; max-height: 96vh }
dialog img { width: auto; min-width: min(92vw, 120vh); max-height: 94vh; object-fit: contain;
  cursor: zoom-out }
dialog::backdrop { background: #000c }
@media (max-width: 760px) { .pictures { grid-template-columns: repeat(2, 1fr) }
  main { padding: 32px 16px } }
@media print { .table { max-height: none } article { break-inside: avoid } }
"""

SCRIPT = """
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
