"""`accelerate launch -m panoptic_cache.train CONFIG ...`: the command `panoptic train` alone.

Exit codes: 0 finished; 1 failed, with one line that says why; 2 wrong usage; 143 and 130 stopped by
SIGTERM and SIGINT, as shells have it: with a checkpoint once steps are made, so `--resume` goes on.
"""

from __future__ import annotations

import typer

from panoptic_cache.pipeline.console import run_program
from panoptic_cache.train.commands import train

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)

if __name__ == "__main__":
    run_program(app)
