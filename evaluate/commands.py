"""Commands of evaluation: scores, predictions and exports."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from panoptic_cache.pipeline.console import (
    Annotations,
    Bgr,
    FollowLinks,
    Images,
    Json,
    Limit,
    Pngs,
    Root,
    Split,
    Upright,
    dataset_layout,
    print_json,
    print_values,
    show,
)

if TYPE_CHECKING:
    from panoptic_cache.evaluate.predict import Predictor
    from panoptic_cache.pipeline.coco import Category

app = typer.Typer()
log = logging.getLogger(__name__)

Checkpoint = Annotated[Path, typer.Option(help="A run's folder, or one of its checkpoints.")]
WeightsOption = Annotated[
    Literal["model", "ema"] | None,
    typer.Option(
        "--weights", help="The last ones or their average; by default the average if there is one."
    ),
]
Device = Annotated[str | None, typer.Option(help="Such as cuda; by default a GPU if there is one.")]

PrecisionOption = Annotated[
    Literal["fp32", "bf16"],
    typer.Option("--precision", help="Of the network; bf16 is several times as fast on a GPU."),
]
Flip = Annotated[
    bool, typer.Option("--flip", help="Average with the mirrored image; runs the network twice.")
]
Sizes = Annotated[
    str | None,
    typer.Option(help="Average over input sides, as 420,518; each costs (side / trained)^2."),
]
Batch = Annotated[int, typer.Option(min=1, help="Images the network takes at once.")]
Tile = Annotated[
    int | None,
    typer.Option(min=0, help="Pixels of a tile; by default as trained, 0 takes photos whole."),
]
Overlap = Annotated[
    int | None, typer.Option(min=0, help="Pixels that tiles share, by default a quarter of one.")
]
Cells = Annotated[int, typer.Option(help="Cells along each axis of the decoder's grid, 20 to 256.")]


@app.command("evaluate")
def evaluate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder of predictions, pictures and report.")],
    coco: Root = None,
    split: Split = None,
    images: Images = None,
    panoptic_json: Annotations = None,
    panoptic_dir: Pngs = None,
    bgr: Bgr = False,
    upright: Upright = False,
    follow_links: FollowLinks = False,
    batch: Batch = 8,
    limit: Limit = None,
    overlays: Annotated[int, typer.Option(min=0, help="Images to draw.")] = 16,
    save_heads: Annotated[
        Path | None, typer.Option(help="Folder for what the heads say, for bench decode --heads.")
    ] = None,
    flip: Flip = False,
    sizes: Sizes = None,
    tile: Tile = None,
    overlap: Overlap = None,
    cells: Cells = 80,
    device: Device = None,
    weights: WeightsOption = None,
    precision: PrecisionOption = "fp32",
    as_json: Json = False,
) -> None:
    """Predict a split, score it, and write predictions, overlays and a report.

    If it was stopped, run it again to go on.
    Several GPUs: accelerate launch -m panoptic_cache.cli evaluate ...
    """
    from panoptic_cache.evaluate.split import evaluate as run
    from panoptic_cache.pipeline.coco import read_dataset
    from panoptic_cache.train.ranks import Ranks

    layout, name = dataset_layout(
        *(coco, split, images, panoptic_json, panoptic_dir),
        bgr=bgr,
        upright=upright,
        follow_links=follow_links,
    )
    dataset = read_dataset(layout).spread(limit)
    ranks = Ranks.current(cpu=device == "cpu")
    settings = {"flip": flip, "weights": weights, "precision": precision}
    tiles = {"tile": tile, "overlap": overlap}
    predictor = _predictor(checkpoint, ranks.device or device, sizes, cells, **settings, **tiles)
    scores = run(
        predictor,
        dataset,
        out,
        batch=batch,
        overlays=overlays,
        heads_folder=save_heads,
        title=f"Panoptic quality, {name}",
        ranks=ranks,
    )
    ranks.leave()
    if ranks.main:
        _show_scores(scores.to_json(), dataset.categories, as_json)
        log.info("report: %s", out / "report.html")


@app.command("predict")
def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Photos, videos, or folders of them.")],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder of overlays, panoptic PNGs and JSON.")],
    recursive: Annotated[bool, typer.Option("--recursive", help="Also of sub-folders.")] = False,
    batch: Batch = 8,
    overlays: Annotated[
        int | None, typer.Option(min=0, help="Photos to draw, and frames of a video; all if unset.")
    ] = None,
    flip: Flip = False,
    sizes: Sizes = None,
    tile: Tile = None,
    overlap: Overlap = None,
    cells: Cells = 80,
    device: Device = None,
    weights: WeightsOption = None,
    precision: PrecisionOption = "fp32",
    as_json: Json = False,
) -> None:
    """Segment any pictures: overlays with labels, panoptic PNGs and their JSON.

    What cannot be read is left out, and the exit code is 3.
    If it was stopped, run it again to go on.
    Several GPUs: accelerate launch -m panoptic_cache.cli predict ...
    """
    from panoptic_cache.evaluate.photos import predict_photos
    from panoptic_cache.pipeline.sources import list_photos
    from panoptic_cache.train.ranks import Ranks

    paths = list_photos(pictures, recursive=recursive, besides=out)
    ranks = Ranks.current(cpu=device == "cpu")
    settings = {"flip": flip, "weights": weights, "precision": precision}
    tiles = {"tile": tile, "overlap": overlap}
    predictor = _predictor(checkpoint, ranks.device or device, sizes, cells, **settings, **tiles)
    done, left_out = predict_photos(
        predictor, paths, out, batch=batch, overlays=overlays, ranks=ranks
    )
    ranks.leave()
    if ranks.main:
        shown = {"pictures": done, "left_out": left_out}
        print_values({**shown, "json": str(out / "panoptic.json")}, as_json)
    if left_out:
        raise typer.Exit(3)


@app.command("score")
def score(
    truth: Annotated[Path, typer.Argument(help="Panoptic JSON of the ground truth.")],
    prediction: Annotated[Path, typer.Argument(help="Panoptic JSON of the prediction.")],
    gt_dir: Annotated[Path | None, typer.Option(help="Its PNGs; by default beside it.")] = None,
    pred_dir: Annotated[Path | None, typer.Option(help="Its PNGs; by default beside it.")] = None,
    bgr: Bgr = False,
    pred_bgr: Annotated[
        bool, typer.Option("--pred-bgr", help="The same of the prediction.")
    ] = False,
    follow_links: FollowLinks = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default as many as save time.")
    ] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Run panopticapi too, if installed, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score one COCO panoptic JSON against another, to the official evaluator's last digit."""
    # Nothing here multiplies matrices, and NumPy starts threads for that when it is imported: on
    # two cores the command takes 147 ms with and 125 ms without them (12 images, best of 15 runs).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from panoptic_cache.evaluate.metric.pairs import read_pairs
    from panoptic_cache.evaluate.metric.score import score_pairs, useful_workers
    from panoptic_cache.pipeline.base.terminal import progress

    if official:
        from panoptic_cache.evaluate.metric import pq as theirs

        reference = theirs.import_official()  # before the work, as it may be missing
    gc.freeze()  # collections, at exit too, need not walk what was imported: 14 of 200 ms
    flags = {"gt_bgr": bgr, "pred_bgr": pred_bgr, "follow_links": follow_links}
    categories, pairs = read_pairs(truth, prediction, gt_dir, pred_dir, **flags)
    workers = workers or useful_workers(len(pairs))
    with progress("score", len(pairs), "images", patience=1.0) as advance:
        scores = score_pairs(categories, pairs, workers=workers, advance=advance)
    # Else the collections at exit walk all that was imported: 195 instead of 165 ms on 12 images.
    gc.freeze()
    values = scores.to_json()
    if official:
        with progress("panopticapi", len(pairs), "images") as advance:
            files = truth, prediction, gt_dir, pred_dir
            found = theirs.run_official(reference, *files, advance=advance)
        values["official"] = theirs.compare_results(scores.pq, found)
    _show_scores(values, categories, as_json)
    if official:
        difference = values["official"]["difference"]
        line = f"largest difference from panopticapi: {difference:.1e}, {values['official']['at']}"
        if difference > theirs.TOLERANCE:
            log.error("%s: more than rounding", line)
            raise typer.Exit(1)
        log.info("%s", line if difference else "panopticapi finds exactly the same")


@app.command("export")
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also model.onnx: photo -> panoptic map.")
    ] = False,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="The graph takes any height and width.")
    ] = False,
    cells: Cells = 80,
    as_json: Json = False,
) -> None:
    """Save a trained model as a folder that Predictor("DIR") loads, and as ONNX."""
    from panoptic_cache.evaluate.export.files import export_model, export_onnx, onnx_difference
    from panoptic_cache.evaluate.predict import Predictor

    predictor = Predictor(checkpoint, "cpu")
    model = predictor.model, predictor.state
    shown: dict[str, Any] = {"folder": str(export_model(*model, out))}
    if onnx:
        path = export_onnx(*model, out, any_size=any_size, cells=cells)
        difference = onnx_difference(*model, path, cells=cells)
        largest = None if difference is None else max(difference.values())
        shown |= {"onnx": str(path), "difference_from_pytorch": largest}
    print_values(shown, as_json)


def _predictor(
    checkpoint: Path, device: str | None, sizes: str | None, cells: int, **settings: Any
) -> Predictor:
    from panoptic_cache.evaluate.decoder.decode import DecodeConfig
    from panoptic_cache.evaluate.predict import Predictor

    try:
        sides = [int(part) for part in sizes.split(",")] if sizes else []
    except ValueError:
        raise typer.BadParameter(f"--sizes takes numbers such as 420,518, not {sizes}") from None
    return Predictor(checkpoint, device, DecodeConfig(cells=cells), sizes=sides, **settings)


def _show_scores(values: dict[str, Any], categories: Sequence[Category], as_json: bool) -> None:
    from panoptic_cache.evaluate.report.tables import score_text

    if as_json:
        print_json(values)
    else:
        show(score_text(values, categories))
