"""What the commands of all stages share: options, printing, and how a program ends."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import Interrupted, interruptible
from panoptic_cache.pipeline.base.terminal import LineFormatter, table

if TYPE_CHECKING:
    from panoptic_cache.pipeline.coco import CocoLayout
    from panoptic_cache.pipeline.render.bench import BenchTable

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Root = Annotated[Path | None, typer.Option("--coco", help="Root of a dataset in COCO's layout.")]
Split = Annotated[str | None, typer.Option(help="Name of the split, such as val2017.")]
Images = Annotated[Path | None, typer.Option(help="Folder of photos, instead of --coco.")]
Annotations = Annotated[Path | None, typer.Option(help="Annotation file, instead of --coco.")]
Pngs = Annotated[Path | None, typer.Option(help="Folder of panoptic PNGs, instead of --coco.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use N images, evenly spread over all.")]
Bgr = Annotated[
    bool, typer.Option("--bgr", help="PNGs with red and blue swapped, as cv2.imwrite swaps them.")
]
Upright = Annotated[
    bool, typer.Option("--upright", help="Annotations are of photos turned as EXIF says.")
]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Follow links that lead out of the dataset.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0: only this one.")]
MaxBad = Annotated[
    float, typer.Option(min=0, help="Images that may be left out: a share below 1, or a count.")
]
Count = Annotated[int, typer.Option("--count", min=1, help="Images to measure on.")]

GRACE = 5.0
"""Seconds in which a launcher ends the other ranks once one has failed."""

POSIX = {"fcntl", "resource"}
"""Modules of Python that Windows has not; training and rendering with workers import them."""

log = logging.getLogger(__name__)


def dataset_layout(
    coco: Path | None,
    split: str | None,
    images: Path | None = None,
    panoptic_json: Path | None = None,
    panoptic_dir: Path | None = None,
    *,
    bgr: bool = False,
    upright: bool = False,
    follow_links: bool = False,
) -> tuple[CocoLayout, str]:
    """The dataset that the options name, and what to call it."""
    from panoptic_cache.pipeline.coco import CocoLayout  # noqa: PLC0415

    if coco is not None and split is not None and not (images or panoptic_json or panoptic_dir):
        layout, name = CocoLayout.of(coco, split), split
    elif coco is None and images and panoptic_json and panoptic_dir:
        layout = CocoLayout(images, panoptic_json, panoptic_dir)
        name = split or panoptic_json.stem.removeprefix("panoptic_")
    else:
        raise typer.BadParameter(
            "give --coco and --split, or --images, --panoptic-json and --panoptic-dir"
        )
    return replace(layout, bgr=bgr, upright=upright, follow_links=follow_links), name


def bench_layout(coco: Path | None, split: str | None) -> CocoLayout | None:
    """The dataset to measure on; None where the options name none."""
    return None if coco is None else dataset_layout(coco, split)[0]


def print_bench(result: BenchTable, as_json: bool) -> None:
    """Prints a benchmark as a table or as JSON."""
    if as_json:
        print_json(result.values)
    else:
        show(result.title)
        print_table(result.columns, result.rows, left=1)


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Prints values by name, as a table or as JSON."""
    if as_json:
        print_json(values)
    else:
        rows = [
            (name, f"{value:,}" if isinstance(value, int) and value is not True else str(value))
            for name, value in values.items()
        ]
        print_table(("", ""), rows, left=2)


def print_json(values: dict[str, Any]) -> None:
    """Prints one JSON object on one line."""
    show(json.dumps(values))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Prints aligned columns, the first `left` of them aligned to the left."""
    show(table(columns, rows, left=left))


def show(text: str) -> None:
    """Prints to standard output, as long as somebody, such as `head`, reads it."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"cannot print: {error.strerror}") from None


def run_program(app: Callable[[], object]) -> NoReturn:
    """Runs a command line; what a user can cause ends in one line and SystemExit.

    Its code is 0 finished, 1 failed, 2 wrong usage, 3 too much left out, 130 and 143 stopped by
    SIGINT and SIGTERM. Of several ranks that share the work, the first one speaks. An error that
    only one of the others has met is told by that one, `GRACE` seconds later: by then the launcher
    has ended the ranks that met the same error as the first.
    """
    _open_streams()
    first = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, handlers=[handler])
    logging.getLogger("panoptic_cache").setLevel(logging.INFO if first else logging.ERROR)
    logging.raiseExceptions = False  # whoever read standard error may have gone
    code = _exit_code(app, first=first)
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of a process group whose other ranks have gone may abort on the way out, and
        # print so below the line that says what happened.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _open_streams() -> None:
    """Opens streams that are closed, else a file of ours would get their numbers, and messages.

    What a terminal cannot show, it gets as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _exit_code(app: Callable[[], object], *, first: bool) -> int:
    try:
        with interruptible():
            app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except InputError as error:
        if not first or error.code == "rank-lost":
            time.sleep(GRACE)
        log.error("%s", error)
    except Interrupted as stop:
        if first:
            log.error("%s", stop)
        return stop.exit_code
    except MemoryError as error:
        log.error("out of memory: %s", error or "ask for less, or for smaller images")
    except ModuleNotFoundError as error:
        if error.name not in POSIX:
            raise
        log.error("this command needs Linux or macOS; on Windows run it under WSL")
    except OSError as error:  # no rights, no such place, a disk that fails
        what = error.strerror or str(error) or type(error).__name__
        log.error("%s: %s", error.filename, what) if error.filename else log.error("%s", what)
    else:
        return 0
    return 1
