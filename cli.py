"""The command line: the commands of all stages as one program.

What takes long to import is imported where it is used, so that Ctrl-C is handled from the start on.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from panoptic_cache.pipeline.base.process import started

if TYPE_CHECKING:
    import typer


def panoptic() -> None:
    """Panoptic segmentation from a precomputed target cache."""


def make_app(name: str = "") -> typer.Typer:
    """The program with the command `name` alone, or with all commands if there is none of it.

    Typer works out the options of every command at each start. For `panoptic score` on 12 images
    that is 9 of 119 ms (the minimum of 20 runs), and the other commands are not asked for.
    """
    import typer

    from panoptic_cache.evaluate import commands as evaluate
    from panoptic_cache.evaluate.runs import commands as studies
    from panoptic_cache.evaluate.study import commands as study
    from panoptic_cache.pipeline import commands as pipeline
    from panoptic_cache.pipeline.convert import commands as convert
    from panoptic_cache.train import commands as train

    stages, measured = (pipeline, train, evaluate, study, studies), (pipeline, train, study)
    app = typer.Typer(
        callback=panoptic,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    commands = [command for stage in stages for command in stage.app.registered_commands]
    app.registered_commands = [each for each in commands if each.name == name]
    if not app.registered_commands:
        app.registered_commands = commands
        bench = typer.Typer(help="Measure against the obvious way and the floor.")
        bench.registered_commands = [
            command for stage in measured for command in stage.bench.registered_commands
        ]
        app.add_typer(bench, name="bench", no_args_is_help=True)
        app.add_typer(convert.app, name="convert", no_args_is_help=True)
    return app


def main() -> None:
    """Runs `panoptic`."""
    with started():
        from panoptic_cache.pipeline.console import run_program

        run_program(make_app(*sys.argv[1:2]))


if __name__ == "__main__":
    main()
