"""Commands of the first stage: made-up scenes, rendering, checking and showing a cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from panoptic_cache.pipeline.console import (
    Annotations,
    Bgr,
    Count,
    FollowLinks,
    Images,
    Json,
    MaxBad,
    Pngs,
    Root,
    Split,
    Upright,
    Workers,
    bench_layout,
    dataset_layout,
    print_bench,
    print_json,
    print_values,
    show,
)

app = typer.Typer()
bench = typer.Typer()
log = logging.getLogger(__name__)

MOST = 1_000_000
"""Scenes of a split."""


@app.command("synth")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    images: Annotated[int, typer.Option(min=1, max=MOST, help="Scenes of the train split.")] = 64,
    val_images: Annotated[int, typer.Option(min=0, max=MOST, help="Scenes of the val split.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int, typer.Option(min=32, max=8192, help="Longer side, pixels.")] = 160,
) -> None:
    """Write made-up scenes as a COCO panoptic dataset."""
    from panoptic_cache.pipeline.base.terminal import progress
    from panoptic_cache.pipeline.scenes.scene import write_dataset

    with progress("synth", images + val_images, "scenes") as advance:
        written = write_dataset(
            out,
            images=images,
            val_images=val_images,
            seed=seed,
            size=size,
            progress=lambda _: advance(),
        )
    log.info("%s: %s", out, "written" if written else "is complete already")


@app.command("preprocess")
def preprocess(
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the cache.")],
    coco: Root = None,
    split: Split = None,
    images: Images = None,
    panoptic_json: Annotations = None,
    panoptic_dir: Pngs = None,
    bgr: Bgr = False,
    upright: Upright = False,
    follow_links: FollowLinks = False,
    fit: Annotated[
        Literal["native", "squash", "longest"],
        typer.Option(help="native: COCO's own size; squash: a square; longest: longer side."),
    ] = "native",
    size: Annotated[
        int | None, typer.Option(min=1, max=16384, help="Pixels; not with native.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Cut images into tiles of so many pixels a side.")
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Pixels that tiles share at least.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 256,
    workers: Workers = 2,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a running Dask scheduler, for --workers.")
    ] = None,
    max_bad: MaxBad = 0.01,
    strict: Annotated[bool, typer.Option(help="Abort at the first warning.")] = False,
    retry: Annotated[bool, typer.Option(help="Try again what was left out before.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check without decoding or writing.")] = False,
    as_json: Json = False,
) -> None:
    """Render a split into shards with precomputed targets; run it again to go on."""
    from panoptic_cache.pipeline.base.files import Storage
    from panoptic_cache.pipeline.coco import read_dataset
    from panoptic_cache.pipeline.render.driver import render
    from panoptic_cache.pipeline.render.dry_run import dry_run as look
    from panoptic_cache.pipeline.render.plan import RenderConfig

    layout, name = dataset_layout(
        *(coco, split, images, panoptic_json, panoptic_dir),
        bgr=bgr,
        upright=upright,
        follow_links=follow_links,
    )
    config = RenderConfig(
        fit=fit, size=size, samples_per_shard=samples_per_shard, tile=tile, overlap=overlap
    )
    dataset = read_dataset(layout)
    if dry_run:
        outlook = look(
            dataset, name, Storage(out), config, workers=workers, max_bad=max_bad, retry=retry
        )
        print_values(outlook, as_json)
        if outlook["too_many"]:
            log.error("%s: more images would be left out than --max-bad allows", out)
            raise typer.Exit(3)
        return
    result = render(
        dataset,
        name,
        Storage(out),
        config,
        workers=workers,
        scheduler=scheduler,
        max_bad=max_bad,
        strict=strict,
        retry=retry,
    )
    print_values(result.to_json(), as_json)
    if result.too_many:
        log.error("%s: more images left out than --max-bad allows, see quarantine.jsonl", out)
        raise typer.Exit(3)


@app.command("verify")
def verify(
    cache: Annotated[str, typer.Argument(help="Folder or URL of a cache.")],
    deep: Annotated[bool, typer.Option(help="Read every byte, decode every member.")] = False,
    as_json: Json = False,
) -> None:
    """Check a cache against its index; exit 1 and name what is damaged."""
    from msgspec import to_builtins

    from panoptic_cache.pipeline.base.files import Storage
    from panoptic_cache.pipeline.base.terminal import plain
    from panoptic_cache.pipeline.cache.verify import verify as check

    report = check(Storage(cache), deep=deep)
    if as_json:
        print_json(to_builtins(report))
    else:
        for problem in report.problems:
            show(plain(str(problem)))
        sound = "sound" if deep else "sound by names and sizes, --deep reads the bytes"
        state = sound if report.ok else f"{len(report.problems)} problems"
        show(f"{report.shards} shards, {report.samples} samples: {state}")
    if not report.ok:
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    place: Annotated[str, typer.Argument(help="A cache's folder or URL, or one tar.")],
    sample: Annotated[str | None, typer.Option(help="Key of the sample to draw.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the sample's picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show a cache or a shard as a table, a sample as one picture."""
    from panoptic_cache.pipeline.cache.inspect import describe, find_sample, summary_table
    from panoptic_cache.pipeline.pictures import sample_sheet, save_picture

    if sample is not None or out is not None:
        found, categories = find_sample(place, sample)
        path = out or Path(f"{found.key}.png")
        save_picture(path, sample_sheet(found, categories))
        print_values({"sample": found.key, "picture": str(path)}, as_json)
        return
    summary = describe(place)
    show(json.dumps(summary) if as_json else summary_table(summary))
    if problem := summary.get("problem"):
        log.warning("%s: %s", place, problem)


@bench.command("render")
def bench_render(
    coco: Root = None, split: Split = None, count: Count = 32, as_json: Json = False
) -> None:
    """Rendering one image on one core."""
    from panoptic_cache.pipeline.render.bench import bench_render as measure

    print_bench(measure(bench_layout(coco, split), count), as_json)
