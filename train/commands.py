"""Commands of training: a run, what a configuration costs, the speed of loading and of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from panoptic_cache.pipeline.console import (
    Count,
    Json,
    Root,
    Split,
    bench_layout,
    print_bench,
    print_json,
    print_table,
)

app = typer.Typer()
bench = typer.Typer()

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, as data.size=616.")
]


@app.command("train")
def train(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    settings: Settings = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    trust_config: Annotated[
        bool, typer.Option("--trust-config", help="Import any module that validation.metric names.")
    ] = False,
) -> None:
    """Train a model from a cache.

    Several GPUs: accelerate launch -m panoptic_cache.train CONFIG ...
    """
    from panoptic_cache.pipeline.base.config import load_config
    from panoptic_cache.train.config import TrainConfig
    from panoptic_cache.train.loop import train as run
    from panoptic_cache.train.stopping import guarded_run

    chosen = load_config(TrainConfig, config, settings or [])
    with guarded_run(chosen):
        run(chosen, resume=resume, trust_config=trust_config)


@app.command("model")
def model(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    settings: Settings = None,
    classes: Annotated[int, typer.Option(min=1, help="Categories; COCO has 133.")] = 133,
    as_json: Json = False,
) -> None:
    """Show a configuration's parameters, operations and memory."""
    from panoptic_cache.pipeline.base.config import load_config
    from panoptic_cache.train.config import TrainConfig
    from panoptic_cache.train.summary import summarize_model

    summary = summarize_model(load_config(TrainConfig, config, settings or []), classes)
    if as_json:
        print_json(summary.to_json())
    else:
        print_table(("", str(config)), summary.rows(), left=2)


@bench.command("load")
def bench_load(
    coco: Root = None, split: Split = None, count: Count = 32, as_json: Json = False
) -> None:
    """Making one training sample on one core."""
    from panoptic_cache.train.bench import bench_load as measure

    print_bench(measure(bench_layout(coco, split), count), as_json)


@bench.command("step")
def bench_step(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A file of configs/; else the paper's on a GPU, a small model elsewhere."
        ),
    ] = None,
    settings: Settings = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of three steps; the best counts.")] = 3,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Try torch.compile too; by default on a GPU only."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Training steps on this machine's device: the encoder, the whole step, fed by the loader."""
    from panoptic_cache.pipeline.base.config import load_config
    from panoptic_cache.train.bench import bench_step as measure
    from panoptic_cache.train.config import TrainConfig

    if config is None and settings:
        raise typer.BadParameter("--set needs a configuration to change")
    run = load_config(TrainConfig, config, settings or []) if config else None
    print_bench(measure(run, rounds=rounds, compiled=compiled), as_json)
