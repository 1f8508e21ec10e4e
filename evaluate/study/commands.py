"""Commands of the studies: how good the decoder is, and how fast decoding and scoring are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from panoptic_cache.pipeline.console import (
    Annotations,
    Bgr,
    Count,
    FollowLinks,
    Images,
    Json,
    Limit,
    Pngs,
    Root,
    Split,
    bench_layout,
    dataset_layout,
    print_bench,
    print_json,
    show,
)

if TYPE_CHECKING:
    from panoptic_cache.train.encoding import Encoding

app = typer.Typer()
bench = typer.Typer()

SemanticNoise = Annotated[
    float, typer.Option(min=0, help="Level of corruption of the semantic logits, 0 to 3.")
]
Drift = Annotated[
    float, typer.Option(min=0, help="Cells that centroids drift within an instance, of 80.")
]
CodeOf = Annotated[
    Path | None, typer.Option("--checkpoint", help="Use the code of this run or checkpoint.")
]
Harmonics = Annotated[
    int | None, typer.Option(min=1, max=8, help="L of the positional code; 4 by default.")
]
PartOption = Annotated[
    Literal["all", "tuning", "reporting"],
    typer.Option("--part", help="Every second image by name, to keep tuning apart from reporting."),
]


@app.command("ceiling")
def ceiling(
    coco: Root = None,
    split: Split = None,
    images: Images = None,
    panoptic_json: Annotations = None,
    panoptic_dir: Pngs = None,
    bgr: Bgr = False,
    follow_links: FollowLinks = False,
    size: Annotated[int, typer.Option(min=1, help="Side of the network's input.")] = 420,
    noise: Annotated[float, typer.Option(min=0, help="Level of corruption, 0 to 3.")] = 0.0,
    semantic_noise: SemanticNoise = 0.0,
    drift: Drift = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the corruption.")] = 0,
    cells: Annotated[
        int, typer.Option(help="Cells along each axis of the decoder's grid, 20 to 256.")
    ] = 80,
    checkpoint: CodeOf = None,
    harmonics: Harmonics = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Score the ground truth, encoded, corrupted and decoded: the best a network could reach."""
    from panoptic_cache.evaluate.decoder.decode import DecodeConfig
    from panoptic_cache.evaluate.report.tables import score_text
    from panoptic_cache.evaluate.study.comparison import ceiling as measure
    from panoptic_cache.evaluate.study.corruption import Corruption
    from panoptic_cache.pipeline.coco import read_dataset

    layout, _ = dataset_layout(
        *(coco, split, images, panoptic_json, panoptic_dir), bgr=bgr, follow_links=follow_links
    )
    dataset = read_dataset(layout).spread(limit)
    corruption = Corruption(size, noise, semantic_noise, drift, seed)
    config, encoding = DecodeConfig(cells=cells), _code(checkpoint, harmonics)
    result, quality = measure(dataset, corruption, encoding=encoding, config=config)
    values = {**result.to_json(), "measured": quality and asdict(quality)}
    if as_json:
        print_json(values)
        return
    show(score_text(values, dataset.categories, by_category=False))
    if quality:
        show(f"measured noise {quality.noise:.3g}, drift {quality.drift:.3g} cells a pixel")


@bench.command("decode")
def bench_decode(
    coco: Root = None,
    split: Split = None,
    heads: Annotated[
        Path | None, typer.Option(help="Heads saved by evaluate --save-heads, instead of --coco.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Images; 4 by default, all of saved heads.")
    ] = None,
    size: Annotated[int, typer.Option(min=14, help="Side of the network's output.")] = 420,
    semantic_noise: SemanticNoise = 0.0,
    drift: Drift = 0.0,
    checkpoint: CodeOf = None,
    harmonics: Harmonics = None,
    part: PartOption = "all",
    as_json: Json = False,
) -> None:
    """Decoding by this and other decoders: PQ and time, on saved heads or by level of noise."""
    from panoptic_cache.evaluate.study.bench import bench_decode as measure
    from panoptic_cache.evaluate.study.bench import bench_heads
    from panoptic_cache.evaluate.study.corruption import Corruption

    if heads is not None:
        if coco or split or checkpoint or harmonics or semantic_noise or drift:
            raise typer.BadParameter("--heads comes with its own images and code")
        print_bench(bench_heads(heads, part, count), as_json)
        return
    corruption = Corruption(size, semantic_noise=semantic_noise, drift=drift)
    encoding, layout = _code(checkpoint, harmonics), bench_layout(coco, split)
    print_bench(measure(layout, count or 4, corruption, encoding, part), as_json)


@bench.command("score")
def bench_score(
    coco: Root = None, split: Split = None, count: Count = 64, as_json: Json = False
) -> None:
    """Scoring one image in one process."""
    from panoptic_cache.evaluate.study.bench import bench_score as measure

    print_bench(measure(bench_layout(coco, split), count), as_json)


def _code(checkpoint: Path | None, harmonics: int | None) -> Encoding:
    """The code of a run, or the positional one."""
    from panoptic_cache.train.checkpoint import find_checkpoint, read_state
    from panoptic_cache.train.encoding import PositionalCode, make_encoding

    if checkpoint is None:
        return PositionalCode(harmonics or PositionalCode().harmonics)
    if harmonics is not None:
        raise typer.BadParameter("give --checkpoint or --harmonics, not both")
    loss = read_state(find_checkpoint(checkpoint)).config.loss
    return make_encoding(loss.encoding, loss.harmonics)
