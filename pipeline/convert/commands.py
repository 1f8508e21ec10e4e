"""`panoptic convert FORMAT`: a command a format, which gives its source; the rest is shared."""

# No `from __future__ import annotations`: Typer reads annotations that are put together here.

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from panoptic_cache.pipeline.console import Json, print_values

if TYPE_CHECKING:
    from panoptic_cache.pipeline.convert.source import Source

app = typer.Typer(help="Write a dataset in COCO's panoptic layout from other annotations.")
log = logging.getLogger(__name__)

Read = TypeVar("Read", bound=Callable[..., Any])
Root = Annotated[Path, typer.Argument(help="Folder of the dataset.")]
Photos = Annotated[Path, typer.Option(help="Folder of photos; folders below it, too.")]
Maps = Annotated[Path, typer.Option(help="Folder of maps, named like their photos.")]
SemanticMaps = Annotated[Path | None, typer.Option(help="Folder of maps of classes; see --names.")]
Names = Annotated[
    Path | None, typer.Option(help="Names of the classes: lines `7 road`, or TOML or JSON.")
]
Void = Annotated[list[int], typer.Option(help="Value of no class; may be given again.")]
Thing = Annotated[str, typer.Option(help="Name of what the instances are.")]
Background = Annotated[
    str | None, typer.Option(help="Name of the rest, as stuff; without one it is unlabelled.")
]
Overlap = Annotated[
    Literal["last", "small"],
    typer.Option(help="Who has the pixels where instances overlap: the last, or the smaller one."),
]


Out = Annotated[Path, typer.Option(help="Root of the dataset to write.")]
Split = Annotated[str, typer.Option(help="Name of the split.")]
Merge = Annotated[
    str | None,
    typer.Option(help="supercategory, or a TOML or JSON file of new names and their old ones."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0: only this one.")]
MaxBad = Annotated[
    float, typer.Option(min=0, help="Images that may be left out: a share below 1, or a count.")
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy photos, where hard links would do.")]
Upright = Annotated[
    bool,
    typer.Option("--upright", help="Photos are annotated as EXIF turns them; so preprocess, too."),
]
# One format has a file that is called --json.
Summary = Annotated[
    bool, typer.Option("--summary-json", help="Print one JSON object, and nothing else.")
]


def command(name: str) -> Callable[[Read], Read]:
    """Makes a command of a function that gives a source: its options, then those of all formats."""

    def register(read: Read) -> Read:
        def run(
            *,
            out: Out,
            split: Split,
            merge: Merge = None,
            workers: Workers = 2,
            max_bad: MaxBad = 0.01,
            copy: Copy = False,
            upright: Upright = False,
            as_json: Json = False,
            **own: Any,
        ) -> None:
            if "split" in options:  # of the source, too
                own["split"] = split
            source = read(**own)
            write(source, out, split, merge, workers, max_bad, copy, upright, as_json)

        options = inspect.signature(read).parameters
        shared = dict(inspect.signature(run).parameters)
        del shared["own"]
        if "json" in options:
            shared["as_json"] = shared["as_json"].replace(annotation=Summary)
        every = {
            key: each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for key, each in {**options, **shared}.items()
        }
        run.__signature__ = inspect.Signature([*every.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {key: each.annotation for key, each in every.items()}
        app.command(name, help=read.__doc__)(run)
        return read

    return register


def write(
    source: "Source",
    out: Path,
    split: str,
    merge: str | None,
    workers: int,
    max_bad: float,
    copy: bool,
    upright: bool,
    as_json: bool,
) -> None:
    """Converts a source, prints the summary; exit code 3 where too much was left out."""
    from dataclasses import asdict

    from panoptic_cache.pipeline.convert.driver import convert
    from panoptic_cache.pipeline.render.plan import allowed

    if merge is not None:
        from panoptic_cache.pipeline.convert.merge import merge as merged

        source = merged(source, merge)
    limit = allowed(max_bad, len(source.items) + len(source.left_out))
    result = convert(source, out, split, workers=workers, copy=copy, upright=upright)
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


@command("coco-instances")
def coco_instances(
    json: Annotated[Path, typer.Option("--json", help="Annotation file.")],
    images: Photos,
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
) -> "Source":
    """COCO's JSON of instances: polygons or RLE; of CVAT, Roboflow, FiftyOne and others, too."""
    from panoptic_cache.pipeline.convert.coco_instances import coco_instances as read

    return read(
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


@command("label-maps")
def label_maps(
    images: Photos,
    maps: Maps,
    thing: Annotated[
        list[str] | None,
        typer.Option(help="Name of what the instances are; with --semantic-maps, one of theirs."),
    ] = None,
    background: Background = None,
    semantic_maps: SemanticMaps = None,
    names: Names = None,
    void: Void = [255],  # noqa: B006
) -> "Source":
    """One integer map an image: 0 is background or void, each other value an instance."""
    from panoptic_cache.pipeline.convert.label_maps import label_maps as read

    return read(
        images,
        maps,
        things=thing or [],
        background=background,
        semantic=semantic_maps,
        names=names,
        void=void,
    )


@command("masks")
def masks(
    root: Annotated[Path, typer.Option(help="Folder of a folder an image.")],
    thing: Thing = "object",
    background: Background = None,
    overlap: Overlap = "last",
) -> "Source":
    """A folder an image, with images/ and one binary mask a file in masks/."""
    from panoptic_cache.pipeline.convert.masks import masks as read

    return read(root, thing=thing, background=background, small=overlap == "small")


@command("semantic-maps")
def semantic_maps(
    images: Photos,
    maps: Maps,
    names: Names = None,
    void: Void = [255],  # noqa: B006
) -> "Source":
    """One map of classes an image and no instances: everything is stuff."""
    from panoptic_cache.pipeline.convert.semantic_maps import semantic_maps as read

    return read(images, maps, names=names, void=void)


@command("cityscapes")
def cityscapes(root: Root, split: str) -> "Source":
    """Cityscapes, after createPanopticImgs of cityscapesScripts: train, val or test."""
    from panoptic_cache.pipeline.convert.panoptic import cityscapes as read

    return read(root, split)


@command("ade20k")
def ade20k(root: Root, split: str) -> "Source":
    """ADE20K, after prepare_ade20k_pan_seg.py of Mask2Former: train or val."""
    from panoptic_cache.pipeline.convert.panoptic import ade20k as read

    return read(root, split)


@command("coco-panoptic")
def coco_panoptic(
    panoptic_json: Annotated[Path, typer.Option(help="Annotation file.")],
    panoptic_dir: Annotated[Path, typer.Option(help="Folder of panoptic PNGs.")],
    images: Photos,
) -> "Source":
    """COCO's panoptic format itself, for --merge."""
    from panoptic_cache.pipeline.convert.panoptic import coco_panoptic as read

    return read(panoptic_json, panoptic_dir, images)
