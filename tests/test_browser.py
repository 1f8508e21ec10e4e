"""The report in a real browser: no error, no request, headings that sort, pictures that open."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import CATEGORIES, page_of, view

from panoptic_cache.evaluate.metric.measures import Breakdown
from panoptic_cache.evaluate.report.pictures import make_figure

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"),
)
PROBE = """<script>
const said = {errors: []};
addEventListener("error", event => said.errors.push(event.message));
addEventListener("securitypolicyviolation", event => said.errors.push(event.blockedURI));
addEventListener("load", () => {
  const [table, confusions] = document.querySelectorAll("table");
  const names = of => [...of.tBodies[0].rows].map(row => row.cells[0].textContent);
  const click = (of, column) => of.tHead.rows[0].cells[column].firstChild.click();
  said.start = names(table);
  click(table, 0); said.byName = names(table);
  click(table, 2); said.byPQ = names(table);
  click(table, 2); said.byPQup = names(table);
  said.arrow = table.tHead.rows[0].cells[2].getAttribute("aria-sort");
  click(confusions, 3); said.confusions = names(confusions);
  document.querySelector("article img").click();
  said.zoomed = document.querySelector("dialog").open;
  said.bars = [...document.querySelectorAll("svg rect")].map(bar => bar.getBBox().height);
  said.wide = document.documentElement.scrollWidth <= innerWidth;
  said.requests = performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:"));
  const result = document.createElement("output");
  result.textContent = JSON.stringify(said); document.body.append(result);
});
</script>"""

MEASURES = Breakdown(
    (0, 2, 0, 4, 0, 0, 0, 0),
    (0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0),
    confusion={(1, 1): 6, (1, 5): 2, (1, None): 9, (5, 1): 1, (9, 9): 3},
)


def test_charts_show_what_was_measured(tmp_path: Path) -> None:
    text = page_of(tmp_path, MEASURES, best=[make_figure(view(), CATEGORIES)])
    chart = text[text.index("<svg") : text.index("</svg>")]
    assert chart.count("<rect") == 3, "from the first to the last size with instances"
    assert "8-16 px" in chart
    assert ">50.0<" in chart
    assert ">75.0<" in chart
    table = text[text.index("<h2>Confusions") : text.index("<h2>Best")]
    assert re.findall(r'data-v="([^"]*)"', table) == [
        *("disc", "&lt;b&gt;box &amp; co&lt;/b&gt;", "2", str(2 / 17)),
        *("&lt;b&gt;box &amp; co&lt;/b&gt;", "disc", "1", "1.0"),
    ]
    empty = page_of(tmp_path, Breakdown())
    assert "<svg" not in empty
    assert "No segment was found under another category" in empty


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no chromium is installed")
    page = tmp_path / "page.html"
    page.write_text(
        page_of(tmp_path, MEASURES, best=[make_figure(view(), CATEGORIES)]).replace(
            "<title>", f"{PROBE}<title>", 1
        )
    )
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    assert said["errors"] == []
    assert "CONSOLE" not in done.stderr
    assert said["requests"] == []
    assert said["start"] == ["disc", "<b>box & co</b>", "sky"]
    assert said["byName"] == ["<b>box & co</b>", "disc", "sky"]
    assert said["byPQ"] == ["sky", "disc", "<b>box & co</b>"]
    assert said["byPQup"] == said["byPQ"][::-1]
    assert said["arrow"] == "ascending"
    assert said["confusions"] == ["<b>box & co</b>", "disc"]
    assert said["zoomed"]
    assert said["wide"], "nothing sticks out of the page"
    low, none, high = said["bars"]
    assert (low / high, none) == (pytest.approx(2 / 3, abs=0.01), 0)
