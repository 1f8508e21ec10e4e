"""`panoptic convert FORMAT`: a command a format, which has its own options; the rest is shared."""

# No `from __future__ import annotations`: Typer reads annotations that are put together here.

import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from panoptic_cache.pipeline.console import FollowLinks, Json, MaxBad, Workers, print_values

app = typer.Typer(help="Write a dataset in COCO's panoptic layout from other annotations.")
log = logging.getLogger(__name__)

Options = Callable[..., None]
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
# One format has a file that is called --json.
Summary = Annotated[
    bool, typer.Option("--summary-json", help="Print one JSON object, and nothing else.")
]


def command(name: str, module: str) -> Callable[[Options], Options]:
    """Makes a command of a function that only declares a format's own options.

    The function of the same name in a module of this package takes them and `follow_links`, and
    returns a `Source`. It is imported when it runs: annotations are read by heavy libraries.
    """

    def register(declare: Options) -> Options:
        def run(
            *,
            out: Annotated[Path, typer.Option(help="Root of the dataset to write.")],
            split: Annotated[str, typer.Option(help="Name of the split.")],
            merge: Annotated[
                str | None,
                typer.Option(
                    help="supercategory, or a TOML or JSON file of new names and their old ones."
                ),
            ] = None,
            workers: Workers = 2,
            max_bad: MaxBad = 0.01,
            copy: Annotated[
                bool, typer.Option("--copy", help="Copy photos, where hard links would do.")
            ] = False,
            upright: Annotated[
                bool,
                typer.Option(
                    "--upright",
                    help="Photos are annotated as EXIF turns them; so preprocess, too.",
                ),
            ] = False,
            follow_links: FollowLinks = False,
            as_json: Json = False,
            **given: Any,
        ) -> None:
            from panoptic_cache.pipeline.convert.categories import merge as merged
            from panoptic_cache.pipeline.convert.driver import convert
            from panoptic_cache.pipeline.render.plan import allowed

            if "split" in own:
                given["split"] = split
            read = import_module(f"panoptic_cache.pipeline.convert.{module}")
            source = getattr(read, declare.__name__)(**given, follow_links=follow_links)
            if merge is not None:
                source = merged(source, merge)
            limit = allowed(max_bad, len(source.items) + len(source.left_out))
            values = convert(source, out, split, workers=workers, copy=copy, upright=upright)
            too_many = values["quarantined"] > limit
            if not as_json:
                counts, unlabelled = values.pop("segments"), values["unlabelled"]
                values |= {f"segments: {name}": count for name, count in counts.items()}
                share = unlabelled / max(1, values["pixels"])
                values["unlabelled"] = f"{unlabelled:,} ({share:.2%} of the pixels)"
            print_values(values, as_json)
            if too_many:
                place = out / "annotations" / f"quarantine_{split}.jsonl"
                log.error("%s: more images left out than --max-bad allows, see %s", out, place)
                raise typer.Exit(3)

        own = inspect.signature(declare).parameters
        shared = dict(inspect.signature(run).parameters)
        del shared["given"]
        if "json" in own:
            shared["as_json"] = shared["as_json"].replace(annotation=Summary)
        every = {
            key: each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for key, each in {**own, **shared}.items()
        }
        run.__signature__ = inspect.Signature([*every.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {key: each.annotation for key, each in every.items()}
        app.command(name, help=declare.__doc__)(run)
        return declare

    return register


@command("coco-instances", "coco_instances")
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
        list[str], typer.Option(help="Name of a category without instances, such as sky.")
    ] = [],  # noqa: B006
    overlap: Overlap = "last",
    no_crowds: Annotated[
        bool, typer.Option("--no-crowds", help="Take crowds as instances: CVAT marks masks so.")
    ] = False,
) -> None:
    """COCO's JSON of instances: polygons or RLE; of CVAT, Roboflow, FiftyOne and others, too."""


@command("label-maps", "maps")
def label_maps(
    images: Photos,
    maps: Maps,
    thing: Annotated[
        list[str],
        typer.Option(help="Name of what the instances are; with --semantic-maps, one of theirs."),
    ] = [],  # noqa: B006
    background: Background = None,
    semantic_maps: SemanticMaps = None,
    names: Names = None,
    void: Void = [255],  # noqa: B006
) -> None:
    """One integer map an image: 0 is background or void, each other value an instance."""


@command("masks", "maps")
def masks(
    root: Annotated[Path, typer.Option(help="Folder of a folder an image.")],
    thing: Thing = "object",
    background: Background = None,
    overlap: Overlap = "last",
) -> None:
    """A folder an image, with images/ and one binary mask a file in masks/."""


@command("semantic-maps", "maps")
def semantic_maps(
    images: Photos,
    maps: Maps,
    names: Names = None,
    void: Void = [255],  # noqa: B006
) -> None:
    """One map of classes an image and no instances: everything is stuff."""


@command("cityscapes", "panoptic")
def cityscapes(root: Root, split: str) -> None:
    """Cityscapes, after createPanopticImgs of cityscapesScripts: train, val or test."""


@command("ade20k", "panoptic")
def ade20k(root: Root, split: str) -> None:
    """ADE20K, after prepare_ade20k_pan_seg.py of Mask2Former: train or val."""


@command("coco-panoptic", "panoptic")
def coco_panoptic(
    panoptic_json: Annotated[Path, typer.Option(help="Annotation file.")],
    panoptic_dir: Annotated[Path, typer.Option(help="Folder of panoptic PNGs.")],
    images: Photos,
) -> None:
    """COCO's panoptic format itself, for --merge."""
