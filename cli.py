"""The command line: the commands of all stages as one program."""

from __future__ import annotations

import typer

from panoptic_cache.evaluate import commands as evaluate
from panoptic_cache.pipeline import commands as pipeline
from panoptic_cache.pipeline.console import run_program
from panoptic_cache.train import commands as train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure against the obvious way and the floor.", no_args_is_help=True)
for stage in (pipeline, train, evaluate):
    app.add_typer(stage.app)  # without a name: its commands become commands of `app`
    bench.add_typer(stage.bench)
app.add_typer(bench, name="bench")


@app.callback()
def panoptic() -> None:
    """Panoptic segmentation from a precomputed target cache."""


def main() -> None:
    """Runs `panoptic`."""
    run_program(app)


if __name__ == "__main__":
    main()
