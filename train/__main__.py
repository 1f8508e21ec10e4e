"""`accelerate launch -m train CONFIG [--set a.b=c ...] [--resume]`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import load_config
from pipeline.errors import InputError
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
    try:
        from train.loop import train  # noqa: PLC0415 - its imports can fail with a clear line

        train(load_config(TrainConfig, config, settings or []), resume=resume)
    except InputError as error:
        logging.getLogger(__name__).error("%s", error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    app()
