"""The command of studies."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Annotated

import typer

from panoptic_cache.pipeline.console import Json, print_json, print_table, show

app = typer.Typer()
bench = typer.Typer()
log = logging.getLogger(__name__)


@app.command("study")
def study(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="A file of studies/.")],
    out: Annotated[Path, typer.Option(help="Folder of caches, runs and the page.")],
    launcher: Annotated[
        str, typer.Option(help="Starts each run, as 'accelerate launch --num_processes 8'.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count runs and steps, and measure the hours.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train and score variants of a configuration over seeds, and compare them on one page.

    If it was stopped, run it again to go on. Exit code 3: some runs failed.
    """
    from panoptic_cache.evaluate.runs.execute import estimate_hours, run_study
    from panoptic_cache.evaluate.runs.results import make_rows, rows_text
    from panoptic_cache.evaluate.runs.study import plan_runs, read_study
    from panoptic_cache.pipeline.base.files import Storage

    chosen = read_study(path)
    if dry_run:
        plan = estimate_hours(chosen, out)
        if as_json:
            print_json({"rows": plan})
            return
        shown = [["-" if each is None else str(each) for each in row.values()] for row in plan]
        print_table(("variant", "runs", "steps each", "hours", ""), shown, left=1)
        return
    notes = run_study(chosen, out, shlex.split(launcher))
    from panoptic_cache.evaluate.runs.page import write_page

    runs = plan_runs(chosen, out)
    rows = make_rows(chosen, runs, notes)
    page = write_page(chosen, out, runs, notes, rows)
    failed = sum(len(row.failed) for row in rows)
    values = {
        "title": chosen.title,
        "base": chosen.base,
        "rows": [row.to_json() for row in rows],
        "page": str(page),
    }
    Storage(str(out)).write("study.json", json.dumps(values, indent=1).encode() + b"\n")
    if as_json:
        print_json(values)
    else:
        show(rows_text(rows))
        log.info("page: %s", page)
    if failed:
        raise typer.Exit(3)
