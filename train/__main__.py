"""`accelerate launch -m train CONFIG [--set a.b=c ...] [--resume]`.

Exit codes: 0 finished; 1 failed, with one line that says why; 2 wrong usage; 143 and 130 stopped by
SIGTERM and SIGINT, as shells have it: with a checkpoint once steps are made, so `--resume` goes on.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import load_config
from pipeline.errors import InputError
from pipeline.interrupt import Interrupted, interruptible
from train.config import TrainConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting, as optim.lr=1e-4.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Trains a model from a cache."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    log = logging.getLogger(__name__)
    try:
        # Its imports can fail with a clear line.
        from train.guards import memory_advice  # noqa: PLC0415
        from train.loop import train  # noqa: PLC0415

        chosen = load_config(TrainConfig, config, settings or [])
        with interruptible(), memory_advice(chosen):
            train(chosen, resume=resume)
    except InputError as error:
        log.error("%s", error)
        raise SystemExit(1) from None
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # every rank stops, one says so
            log.error("%s", stop)
        raise SystemExit(stop.exit_code) from None


if __name__ == "__main__":
    app()
