"""The command line: parses, sets up logging, calls one function."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.stopping import Interrupted, interruptible
from panoptic_cache.pipeline.base.text import table

if TYPE_CHECKING:
    from panoptic_cache.evaluate.metric.pq import PQResult
    from panoptic_cache.pipeline.coco import Category, CocoLayout
    from panoptic_cache.pipeline.render.bench import BenchResult

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Root = Annotated[Path | None, typer.Option("--coco", help="Root of a dataset in COCO's layout.")]
Split = Annotated[str | None, typer.Option(help="Such as val2017.")]
Images = Annotated[Path | None, typer.Option(help="Folder of photos, instead of --coco.")]
Annotations = Annotated[Path | None, typer.Option(help="Annotation file, instead of --coco.")]
Pngs = Annotated[Path | None, typer.Option(help="Folder of panoptic PNGs, instead of --coco.")]
Checkpoint = Annotated[Path, typer.Option(help="A run's folder, or one of its checkpoints.")]
WeightsOption = Annotated[
    Literal["model", "ema"] | None,
    typer.Option("--weights", help="Last ones or their average; the average where there is one."),
]
Device = Annotated[str | None, typer.Option(help="Such as cuda; by default a GPU if there is one.")]

SemanticNoise = Annotated[
    float, typer.Option(min=0, help="Level of corruption of the semantic logits, 0 to 3.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")]
PrecisionOption = Annotated[
    Literal["fp32", "bf16"],
    typer.Option("--precision", help="Of the network; bf16 is several times as fast on a GPU."),
]
Flip = Annotated[
    bool, typer.Option("--flip", help="Average with the mirrored picture: 2x the network.")
]
Sizes = Annotated[
    str | None,
    typer.Option(help="Average over input sides, as 420,518; each costs (side / trained)^2."),
]


@app.callback()
def panoptic() -> None:
    """Panoptic segmentation from a precomputed target cache."""


@app.command("synth")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    images: Annotated[int, typer.Option(min=1, help="Scenes of the train split.")] = 64,
    val_images: Annotated[int, typer.Option(min=0, help="Scenes of the val split.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int, typer.Option(min=32, help="Longer side, pixels.")] = 160,
) -> None:
    """Write made-up scenes as a COCO panoptic dataset."""
    from panoptic_cache.pipeline.base.progress import progress
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
    fit: Annotated[
        Literal["native", "squash", "longest"],
        typer.Option(help="native: COCO's own size; squash: a square; longest: longer side."),
    ] = "native",
    size: Annotated[int | None, typer.Option(min=1, help="Pixels; not with native.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = in this one.")] = 2,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a running Dask scheduler, for --workers.")
    ] = None,
    max_bad: Annotated[
        float, typer.Option(min=0, help="Images that may be left out: a part below 1, or a count.")
    ] = 0.01,
    strict: Annotated[bool, typer.Option(help="Every warning aborts.")] = False,
    retry: Annotated[bool, typer.Option(help="Try again what was left out before.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check what can be without decoding.")] = False,
    as_json: Json = False,
) -> None:
    """Render a split into shards with precomputed targets; run again to go on."""
    from panoptic_cache.pipeline.base.config import RenderConfig
    from panoptic_cache.pipeline.base.files import Storage
    from panoptic_cache.pipeline.coco import read_dataset
    from panoptic_cache.pipeline.render.driver import render
    from panoptic_cache.pipeline.render.dry_run import dry_run as look

    layout, name = _layout(coco, split, images, panoptic_json, panoptic_dir)
    config = RenderConfig(fit=fit, size=size, samples_per_shard=samples_per_shard)
    dataset = read_dataset(layout)
    if dry_run:
        outlook = look(
            dataset,
            config,
            workers=workers,
            max_bad=max_bad,
            split=name,
            storage=Storage(out),
            retry=retry,
        )
        _show(outlook, as_json)
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
    _show(result.to_json(), as_json)
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
    from panoptic_cache.pipeline.base.files import Storage
    from panoptic_cache.pipeline.cache.verify import verify as check

    report = check(Storage(cache), deep=deep)
    if as_json:
        _print_json(report.to_json())
    else:
        for problem in report.problems:
            print(problem)
        sound = "sound" if deep else "sound by names and sizes, --deep reads the bytes"
        state = sound if report.ok else f"{len(report.problems)} problems"
        print(f"{report.shards} shards, {report.samples} samples: {state}")
    if not report.ok:
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    place: Annotated[str, typer.Argument(help="A cache's folder or URL, or one tar.")],
    sample: Annotated[str | None, typer.Option(help="Key of the sample to draw.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to put the sample's picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show a cache or a shard as a table, a sample as one picture."""
    from panoptic_cache.pipeline.cache.inspect import (
        ShardSummary,
        describe,
        find_categories,
        find_sample,
    )
    from panoptic_cache.pipeline.pictures.colours import save_picture
    from panoptic_cache.pipeline.pictures.sample_sheet import sample_sheet

    if sample is not None or out is not None:
        found = find_sample(place, sample)
        path = out or Path(f"{found.key}.png")
        save_picture(path, sample_sheet(found, find_categories(place)))
        _show({"sample": found.key, "picture": str(path)}, as_json)
        return
    summary = describe(place)
    if as_json:
        _print_json(summary.to_json())
    elif isinstance(summary, ShardSummary):
        _print_table(summary.COLUMNS, summary.rows(), left=1)
    else:
        _print_table(("", place), summary.rows(), left=2)
    if isinstance(summary, ShardSummary) and summary.problem:
        log.warning("%s: %s", place, summary.problem)


@app.command("ceiling")
def ceiling(
    coco: Root = None,
    split: Split = None,
    images: Images = None,
    panoptic_json: Annotations = None,
    panoptic_dir: Pngs = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the network's input.")] = 420,
    noise: Annotated[float, typer.Option(min=0, help="Level of corruption, 0 to 3.")] = 0.0,
    semantic_noise: SemanticNoise = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the corruption.")] = 0,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Score the ground truth, encoded, corrupted and decoded: the best a network could reach."""
    from panoptic_cache.evaluate.study.ceiling import ceiling as measure
    from panoptic_cache.pipeline.coco import read_dataset

    layout, _ = _layout(coco, split, images, panoptic_json, panoptic_dir)
    dataset = read_dataset(layout).head(limit)
    result = measure(dataset, size=size, noise=noise, semantic_noise=semantic_noise, seed=seed)
    _show_scores(result.pq, dataset.categories, result.to_json(), as_json, by_category=False)


@app.command("evaluate")
def evaluate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder of predictions, pictures and report.")],
    coco: Root = None,
    split: Split = None,
    images: Images = None,
    panoptic_json: Annotations = None,
    panoptic_dir: Pngs = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
    limit: Limit = None,
    overlays: Annotated[int, typer.Option(min=0, help="Images to draw.")] = 16,
    flip: Flip = False,
    sizes: Sizes = None,
    device: Device = None,
    weights: WeightsOption = None,
    precision: PrecisionOption = "fp32",
    as_json: Json = False,
) -> None:
    """Predict a split, score it, and write predictions, overlays and a report.

    Stopped, it goes on when run again. Several GPUs: accelerate launch cli.py evaluate ...
    """
    from panoptic_cache.evaluate.predict import Predictor
    from panoptic_cache.evaluate.ranks import Ranks
    from panoptic_cache.evaluate.split.evaluation import evaluate as run
    from panoptic_cache.pipeline.coco import read_dataset

    layout, name = _layout(coco, split, images, panoptic_json, panoptic_dir)
    dataset = read_dataset(layout).head(limit)
    ranks = Ranks.current(cpu=device == "cpu")
    outcome = run(
        Predictor(
            checkpoint,
            ranks.device or device,
            flip=flip,
            sizes=_sides(sizes),
            weights=weights,
            precision=precision,
        ),
        dataset,
        out,
        batch=batch,
        overlays=overlays,
        title=f"Panoptic quality, {name}",
        ranks=ranks,
    )
    ranks.leave()
    if ranks.main:
        _show_scores(outcome.pq, dataset.categories, outcome.to_json(), as_json)
        log.info("report: %s", out / "report.html")


@app.command("score")
def score(
    truth: Annotated[Path, typer.Argument(help="Panoptic JSON of the ground truth.")],
    prediction: Annotated[Path, typer.Argument(help="Panoptic JSON of the prediction.")],
    gt_dir: Annotated[Path | None, typer.Option(help="Its PNGs; by default beside it.")] = None,
    pred_dir: Annotated[Path | None, typer.Option(help="Its PNGs; by default beside it.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default as many as help.")
    ] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Run panopticapi too, if installed, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score one COCO panoptic JSON against another, to the official evaluator's last digit."""
    # Before numpy is imported, of which starting threads for linear algebra would take a third.
    # Nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from panoptic_cache.evaluate.metric.pairs import read_pairs
    from panoptic_cache.evaluate.metric.pool import useful_workers
    from panoptic_cache.evaluate.metric.score import score_all
    from panoptic_cache.pipeline.base.collector import collector_paused
    from panoptic_cache.pipeline.base.progress import progress

    if official:
        from panoptic_cache.evaluate.metric.official import (
            compare_results,
            import_official,
            run_official,
        )

        reference = import_official()
    with collector_paused():
        categories, pairs = read_pairs(truth, prediction, gt_dir, pred_dir)
        workers = workers or useful_workers(len(pairs))
        with progress("score", len(pairs), "images", patience=1.0) as advance:
            scores = score_all(categories, pairs, workers=workers, advance=advance)
    values = scores.to_json()
    if not official:
        _show_scores(scores.pq, categories, values, as_json)
        return
    with progress("panopticapi", len(pairs), "images") as advance:
        theirs = run_official(reference, truth, prediction, gt_dir, pred_dir, advance=advance)
    found = compare_results(scores.pq, theirs)
    _show_scores(scores.pq, categories, {**values, "official": found.to_json()}, as_json)
    line = f"largest difference from panopticapi: {found.difference:.1e}, {found.at}"
    if not found.agrees:
        log.error("%s: more than rounding", line)
        raise typer.Exit(1)
    log.info("%s", line if found.difference else "panopticapi finds exactly the same")


@app.command("predict")
def predict(
    pictures: Annotated[list[Path], typer.Argument(help="JPEGs, PNGs, or folders of them.")],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder of overlays, panoptic PNGs and JSON.")],
    flip: Flip = False,
    sizes: Sizes = None,
    device: Device = None,
    weights: WeightsOption = None,
    precision: PrecisionOption = "fp32",
    as_json: Json = False,
) -> None:
    """Segment any pictures: overlays with labels, panoptic PNGs and their JSON.

    What cannot be read is left out, and the exit code is 3.
    """
    from panoptic_cache.evaluate.photos import list_pictures
    from panoptic_cache.evaluate.predict import Predictor
    from panoptic_cache.evaluate.writer import predict_pictures

    paths = list_pictures(pictures)
    predictor = Predictor(
        checkpoint,
        device,
        flip=flip,
        sizes=_sides(sizes),
        weights=weights,
        precision=precision,
    )
    written = predict_pictures(predictor, paths, out)
    shown = {"pictures": written.pictures, "left_out": written.left_out, "json": str(written.json)}
    _show(shown, as_json)
    if written.left_out:
        raise typer.Exit(3)


@app.command("export")
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also model.onnx: photo -> panoptic map.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Save a trained model as a folder that Predictor("DIR") loads, and as ONNX."""
    from panoptic_cache.evaluate.export import export_model, export_onnx, onnx_difference
    from panoptic_cache.evaluate.predict import Predictor

    predictor = Predictor(checkpoint, "cpu")
    shown: dict[str, Any] = {"folder": str(export_model(predictor.model, predictor.state, out))}
    if onnx:
        path = export_onnx(predictor.model, predictor.state, out, predictor.cells)
        difference = onnx_difference(predictor.model, predictor.state, path, predictor.cells)
        largest = None if difference is None else max(difference.values())
        shown |= {"onnx": str(path), "difference_from_pytorch": largest}
    _show(shown, as_json)


@app.command("model")
def model(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting, as data.size=616.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Categories; COCO has 133.")] = 133,
    as_json: Json = False,
) -> None:
    """Show a configuration's parameters, operations and memory."""
    from panoptic_cache.pipeline.base.config import load_config
    from panoptic_cache.train.config import TrainConfig
    from panoptic_cache.train.summary import summarize_model

    summary = summarize_model(load_config(TrainConfig, config, settings or []), classes)
    if as_json:
        _print_json(summary.to_json())
    else:
        _print_table(("", str(config)), summary.rows(), left=2)


bench = typer.Typer(help="Measure against the obvious way and the floor.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Count = Annotated[int, typer.Option("--count", min=1, help="Images to measure on.")]


@bench.command("render")
def bench_render(
    coco: Root = None, split: Split = None, count: Count = 32, as_json: Json = False
) -> None:
    """Rendering one image on one core."""
    from panoptic_cache.pipeline.render.bench import bench_render as measure

    _show_bench(measure(_bench_layout(coco, split), count), as_json)


@bench.command("load")
def bench_load(
    coco: Root = None, split: Split = None, count: Count = 32, as_json: Json = False
) -> None:
    """Making one training sample on one core."""
    from panoptic_cache.train.bench import bench_load as measure

    _show_bench(measure(_bench_layout(coco, split), count), as_json)


@bench.command("step")
def bench_step(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A file of configs/; else the paper's on a GPU, a small model elsewhere."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting, as data.size=616.")
    ] = None,
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
    from panoptic_cache.train.bench_step import bench_step as measure
    from panoptic_cache.train.config import TrainConfig

    if config is None and settings:
        raise typer.BadParameter("--set needs a configuration to change")
    run = load_config(TrainConfig, config, settings or []) if config else None
    _show_bench(measure(run, rounds=rounds, compiled=compiled), as_json)


@bench.command("decode")
def bench_decode(
    coco: Root = None,
    split: Split = None,
    count: Count = 4,
    size: Annotated[int, typer.Option(min=14, help="Side of the network's output.")] = 420,
    semantic_noise: SemanticNoise = 0.0,
    as_json: Json = False,
) -> None:
    """Decoding by ours and by other decoders: PQ by level of noise, and time."""
    from panoptic_cache.evaluate.study.bench import bench_decode as measure

    _show_bench(measure(_bench_layout(coco, split), count, size, semantic_noise), as_json)


@bench.command("score")
def bench_score(
    coco: Root = None, split: Split = None, count: Count = 64, as_json: Json = False
) -> None:
    """Scoring one image in one process."""
    from panoptic_cache.evaluate.study.bench import bench_score as measure

    _show_bench(measure(_bench_layout(coco, split), count), as_json)


def _bench_layout(coco: Path | None, split: str | None) -> CocoLayout | None:
    return None if coco is None else _layout(coco, split, None, None, None)[0]


def _show_bench(result: BenchResult, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_json())
        return
    print(result.title)
    _print_table(result.columns, result.rows(), left=1)


def _layout(
    coco: Path | None,
    split: str | None,
    images: Path | None,
    panoptic_json: Path | None,
    panoptic_dir: Path | None,
) -> tuple[CocoLayout, str]:
    """The dataset that the options name, and what to call it."""
    from panoptic_cache.pipeline.coco import CocoLayout

    if coco is not None and split is not None and not (images or panoptic_json or panoptic_dir):
        return CocoLayout.of(coco, split), split
    if coco is None and images and panoptic_json and panoptic_dir:
        name = split or panoptic_json.stem.removeprefix("panoptic_")
        return CocoLayout(images, panoptic_json, panoptic_dir), name
    raise typer.BadParameter(
        "give --coco and --split, or --images, --panoptic-json and --panoptic-dir"
    )


def _sides(text: str | None) -> tuple[int, ...]:
    """`420,518` as numbers."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"--sizes takes numbers such as 420,518, not {text}") from None


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(values)
    else:
        rows = [
            (name, f"{value:,}" if isinstance(value, int) and value is not True else str(value))
            for name, value in values.items()
        ]
        _print_table(("", ""), rows, left=2)


def _show_scores(
    result: PQResult,
    categories: Sequence[Category],
    values: dict[str, Any],
    as_json: bool,
    *,
    by_category: bool = True,
) -> None:
    from panoptic_cache.evaluate.report.tables import score_text

    if as_json:
        _print_json(values)
        return
    print(score_text(result, categories, values, by_category=by_category))
    if "seconds_per_image" in values:
        parts = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in values["seconds_per_image"].items())
        print(f"{values['images']} images; ms an image: {parts}")


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    print(table(columns, rows, left=left))


log = logging.getLogger("panoptic")


def _with_command(names: Sequence[str]) -> typer.Typer:
    """The application with the command of that name alone, or with all where it is none.

    Typer works out the options of all commands at every start, which takes as long as scoring two
    images.
    """
    only = copy(app)
    only.registered_groups = []
    only.registered_commands = [
        command for command in app.registered_commands if [command.name] == [*names]
    ]
    return only if only.registered_commands else app


def main() -> None:
    """Runs the command line; what a user can cause ends in one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("panoptic", "panoptic_cache"):
        # Of several processes that share the work, the first one speaks.
        main_process = os.environ.get("RANK", "0") == "0"
        logging.getLogger(name).setLevel(logging.INFO if main_process else logging.CRITICAL)
    try:
        with interruptible():
            _with_command(sys.argv[1:2])()
    except InputError as error:
        log.error("%s", error)
        raise SystemExit(1) from None
    except Interrupted as stop:
        log.error("%s", stop)
        raise SystemExit(stop.exit_code) from None
    except BrokenPipeError:  # whoever reads what is printed, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # no rights, no such place, a disk that fails
        what = error.strerror or str(error) or type(error).__name__
        log.error("%s: %s", error.filename, what) if error.filename else log.error("%s", what)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
