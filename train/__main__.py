"""`accelerate launch -m panoptic_cache.train CONFIG ...`: the command `panoptic train` alone.

Exit codes: 0 finished; 1 failed, with one line that says why; 2 wrong usage; 143 and 130 stopped by
SIGTERM and SIGINT, as shells have it: with a checkpoint once steps are made, so `--resume` goes on.
"""

from __future__ import annotations

from panoptic_cache.pipeline.base.process import started


def main() -> None:
    """Runs the command."""
    with started():
        import typer  # noqa: PLC0415

        from panoptic_cache.pipeline.console import run_program  # noqa: PLC0415
        from panoptic_cache.train.commands import train  # noqa: PLC0415

        app = typer.Typer(
            add_completion=False,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        app.command()(train)
        run_program(app)


if __name__ == "__main__":
    main()
