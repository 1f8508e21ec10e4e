"""`panoptic convert FORMAT`: a command a format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from panoptic_cache.pipeline.console import Json, print_values

if TYPE_CHECKING:
    from panoptic_cache.pipeline.convert.source import Source

app = typer.Typer(help="Write a dataset in COCO's panoptic layout from other annotations.")
log = logging.getLogger(__name__)

Out = Annotated[Path, typer.Option(help="Root of the dataset to write.")]
Split = Annotated[str, typer.Option(help="Name of the split to write.")]
Photos = Annotated[Path, typer.Option(help="Folder of photos; folders below it, too.")]
Maps = Annotated[Path, typer.Option(help="Folder of maps, named like their photos.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the photos instead of linking them.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0: only this one.")]
MaxBad = Annotated[
    float, typer.Option(min=0, help="Images that may be left out: a share below 1, or a count.")
]
Thing = Annotated[str, typer.Option(help="Name of what the instances are.")]
Background = Annotated[
    str | None, typer.Option(help="Name of the rest, as stuff; without one it is unlabelled.")
]
Overlap = Annotated[
    Literal["last", "small"],
    typer.Option(
        help="Whose pixels are where instances overlap: the last one's, or the smaller's."
    ),
]
Names = Annotated[
    Path | None, typer.Option(help="Names of the classes: lines `7 road`, or TOML or JSON.")
]
SemanticMaps = Annotated[
    Path | None, typer.Option(help="Folder of maps of classes, which --names names.")
]
Void = Annotated[list[int], typer.Option(help="Value of no class; may be given again.")]


def write(
    source: Source, out: Path, split: str, workers: int, max_bad: float, copy: bool, as_json: bool
) -> None:
    """Converts a source, prints the summary; exit code 3 where too much was left out."""
    from dataclasses import asdict

    from panoptic_cache.pipeline.convert.driver import convert
    from panoptic_cache.pipeline.render.plan import allowed

    limit = allowed(max_bad, len(source.items) + len(source.left_out))
    result = convert(source, out, split, workers=workers, copy=copy)
    values = asdict(result)
    if not as_json:
        counts = values.pop("segments")
        values |= {f"segments: {name}": count for name, count in counts.items()}
        share = result.unlabelled / max(1, result.pixels)
        values["unlabelled"] = f"{result.unlabelled:,} ({share:.2%} of the pixels)"
    print_values(values, as_json)
    if result.quarantined > limit:
        place = out / "annotations" / f"quarantine_{split}.jsonl"
        log.error("%s: more images left out than --max-bad allows, see %s", out, place)
        raise typer.Exit(3)


@app.command("coco-instances")
def coco_instances(
    json: Annotated[Path, typer.Option("--json", help="Annotation file.")],
    images: Photos,
    out: Out,
    split: Split,
    stuff_json: Annotated[
        Path | None, typer.Option(help="Annotation file of stuff, drawn below.")
    ] = None,
    semantic_maps: SemanticMaps = None,
    names: Names = None,
    void: Void = [255],  # noqa: B006
    background: Background = None,
    stuff: Annotated[
        list[str] | None, typer.Option(help="Name of a category without instances, such as sky.")
    ] = None,
    overlap: Overlap = "last",
    no_crowds: Annotated[
        bool, typer.Option("--no-crowds", help="Take crowds as instances: CVAT marks masks so.")
    ] = False,
    workers: Workers = 2,
    max_bad: MaxBad = 0.01,
    copy: Copy = False,
    as_json: Annotated[
        bool, typer.Option("--summary-json", help="Print one JSON object, and nothing else.")
    ] = False,
) -> None:
    """COCO's JSON of instances: polygons or RLE; of CVAT, Roboflow, FiftyOne and others, too."""
    from panoptic_cache.pipeline.convert.coco_instances import coco_instances as read

    source = read(
        json,
        images,
        stuff_json=stuff_json,
        semantic=semantic_maps,
        names=names,
        void=void,
        background=background,
        stuff=stuff or [],
        small=overlap == "small",
        crowds=not no_crowds,
    )
    write(source, out, split, workers, max_bad, copy, as_json)


@app.command("label-maps")
def label_maps(
    images: Photos,
    maps: Maps,
    out: Out,
    split: Split,
    thing: Annotated[
        list[str] | None,
        typer.Option(help="Name of what the instances are; with --semantic-maps, one of theirs."),
    ] = None,
    background: Background = None,
    semantic_maps: SemanticMaps = None,
    names: Names = None,
    void: Void = [255],  # noqa: B006
    workers: Workers = 2,
    max_bad: MaxBad = 0.01,
    copy: Copy = False,
    as_json: Json = False,
) -> None:
    """One integer map an image: 0 is background or void, each other value an instance."""
    from panoptic_cache.pipeline.convert.label_maps import label_maps as read

    source = read(
        images,
        maps,
        things=thing or [],
        background=background,
        semantic=semantic_maps,
        names=names,
        void=void,
    )
    write(source, out, split, workers, max_bad, copy, as_json)


@app.command("masks")
def masks(
    root: Annotated[Path, typer.Option(help="Folder of a folder an image.")],
    out: Out,
    split: Split,
    thing: Thing = "object",
    background: Background = None,
    overlap: Overlap = "last",
    workers: Workers = 2,
    max_bad: MaxBad = 0.01,
    copy: Copy = False,
    as_json: Json = False,
) -> None:
    """A folder an image, with images/ and one binary mask a file in masks/."""
    from panoptic_cache.pipeline.convert.masks import masks as read

    source = read(root, thing=thing, background=background, small=overlap == "small")
    write(source, out, split, workers, max_bad, copy, as_json)


@app.command("semantic-maps")
def semantic_maps(
    images: Photos,
    maps: Maps,
    out: Out,
    split: Split,
    names: Names = None,
    void: Void = [255],  # noqa: B006
    workers: Workers = 2,
    max_bad: MaxBad = 0.01,
    copy: Copy = False,
    as_json: Json = False,
) -> None:
    """One map of classes an image and no instances: everything is stuff."""
    from panoptic_cache.pipeline.convert.semantic_maps import semantic_maps as read

    write(read(images, maps, names=names, void=void), out, split, workers, max_bad, copy, as_json)
