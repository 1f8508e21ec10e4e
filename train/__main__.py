"""`accelerate launch -m train CONFIG [--set a.b=c ...] [--resume]`.

Exit codes: 0 finished; 1 failed, with one line that says why; 2 wrong usage; 143 and 130 stopped by
SIGTERM and SIGINT, as shells have it: with a checkpoint once steps are made, so `--resume` goes on.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from panoptic_cache.pipeline.base.config import load_config
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.stopping import Interrupted, interruptible
from panoptic_cache.train.config import TrainConfig

GRACE = 5.0
"""Seconds in which a launcher ends the other ranks once one has failed."""

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
    first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if first else logging.ERROR  # what concerns all ranks is said once
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    log = logging.getLogger(__name__)
    try:
        # Its imports can fail with a clear line.
        from panoptic_cache.train.guards import (  # noqa: PLC0415
            alone,
            disk_advice,
            memory_advice,
            rank_advice,
            smaller_steps,
        )
        from panoptic_cache.train.loop import train  # noqa: PLC0415
        from panoptic_cache.train.stopping import stop_with_launcher  # noqa: PLC0415

        chosen = load_config(TrainConfig, config, settings or [])
        stop_with_launcher()
        with ExitStack() as guards:
            guards.enter_context(interruptible())
            guards.enter_context(disk_advice(Path(chosen.out)))
            if first:
                guards.enter_context(alone(Path(chosen.out)))
            guards.enter_context(memory_advice(smaller_steps(chosen)))
            guards.enter_context(rank_advice())
            train(chosen, resume=resume)
    except InputError as error:
        # What all ranks met, the first one says; what one met, that one: the others are ended.
        if not first or error.code == "rank-lost":
            time.sleep(GRACE)
        log.error("%s", error)
        raise SystemExit(1) from None
    except Interrupted as stop:
        if first:  # every rank stops, one says so
            log.error("%s", stop)
        raise SystemExit(stop.exit_code) from None


def run_rank() -> None:
    """Runs `app`; a rank that fails leaves without cleaning up after its group.

    Threads of a process group whose other ranks have gone may abort on the way out, and say so
    below the line that tells what happened.
    """
    try:
        app()
    except SystemExit as stop:
        if stop.code and os.environ.get("WORLD_SIZE", "1") != "1":
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise


if __name__ == "__main__":
    run_rank()
