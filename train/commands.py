"""Commands of training: a run, what a configuration costs, the speed of loading and of a step."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

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
log = logging.getLogger(__name__)

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, as data.size=616.")
]


@app.command("train")
def train(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    step: Annotated[
        int | None, typer.Argument(help="As --resume STEP: go on from the checkpoint of this step.")
    ] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    trust_config: Annotated[
        bool, typer.Option("--trust-config", help="Import any module that validation.metric names.")
    ] = False,
) -> None:
    """Train a model from a cache.

    Several GPUs: accelerate launch -m panoptic_cache.train CONFIG ...
    """
    from panoptic_cache.pipeline.base.process import handled, leave

    with handled(leave):  # seconds, in which there is nothing to close
        from panoptic_cache.train.loop import train as run
        from panoptic_cache.train.stages import begun_stages, load_stages
        from panoptic_cache.train.stopping import guarded_run

    if step is not None and not resume:
        raise typer.BadParameter(f"write --resume {step} to go on from step {step}")
    stages = load_stages(config, settings or [])
    begun = begun_stages(stages) if resume else 0
    for number, chosen in enumerate(stages[max(0, begun - 1) :], max(1, begun)):
        if len(stages) > 1:
            log.info("stage %d of %d: %s", number, len(stages), chosen.out)
        with guarded_run(chosen):
            run(chosen, resume=step or resume, trust_config=trust_config)
        step = None  # of the stage that it goes on with


@app.command("model")
def model(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    settings: Settings = None,
    classes: Annotated[int, typer.Option(min=1, help="Categories; COCO has 133.")] = 133,
    device: Annotated[
        Literal["a100", "h100", "h200", "l4", "l40s", "rtx4090"] | None,
        typer.Option(help="Estimate the run's hours and memory on this GPU."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, for --device.")] = 1,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images to train on, for --device; COCO's by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a configuration's parameters, operations and memory, and what a run costs on a GPU."""
    from panoptic_cache.train.stages import load_stages
    from panoptic_cache.train.summary import COCO_IMAGES, run_cost, summarize_model

    stages, found = load_stages(config, settings or []), []
    for run in stages:
        summary = summarize_model(run, classes)
        values, rows = asdict(summary), summary.rows()
        if device is not None:
            cost = run_cost(summary, run, device, gpus=gpus, images=images or COCO_IMAGES)
            values["run"], rows = asdict(cost), [*rows, *cost.rows()]
        found.append(values)
        if not as_json:
            print_table(("", str(config) if len(stages) == 1 else run.out), rows, left=2)
    if as_json:
        print_json(found[0] if len(found) == 1 else {"stages": found})


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
