"""What the heads of a network say of annotated images, saved: `meta.json`, one `.npz` an image.

`meta.json` holds the categories by label, `network_size`, `encoding` (positional unless named) and
its `harmonics`, and where the heads come from: `name`, `step`, `fit`, `split`. `KEY.npz` holds:

| key | what |
|---|---|
| instance | (channels, h, w) float16 codes at the network's input size, without padding |
| semantic | (C, h, w) float16 logits |
| size | native (H, W) |
| ids | (H, W) int32 true segment ids, 0 = void |
| seg_id, seg_category, seg_iscrowd | the true segments, as annotated |
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.encoding import Encoding, PositionalCode, make_encoding

META = "meta.json"
Part = Literal["all", "tuning", "reporting"]
"""Images to find settings on, images to report numbers of, or both."""
TUNED_ON = frozenset({"demo", "dsb300", "coco27", "train2017"})
"""Saved heads, by the name in `meta.json`, and splits of photos on whose tuning parts our decoder's
settings were found. Their reporting parts, and all others, are for numbers that are told."""
REMEDY = "write them with panoptic evaluate --save-heads"


@dataclass(frozen=True)
class ImageHeads:
    """One annotated image and what a network says of it."""

    name: str  # Of the file, without its ending; or the image id
    instance: Tensor  # (channels, h, w) float32 codes
    semantic: Tensor  # (C, h, w) float32 logits
    ids: NDArray[np.int32]  # (H, W) int32 true segment ids, 0 = void
    segments: tuple[SegmentInfo, ...]  # As annotated

    @property
    def size(self) -> tuple[int, int]:
        """Native (H, W)."""
        return self.ids.shape[0], self.ids.shape[1]

    def positional(self, encoding: Encoding) -> ImageHeads:
        """The same with positional codes."""
        if isinstance(encoding, PositionalCode):
            return self
        code = encoding.to_positional(self.instance.flatten(1))
        return replace(self, instance=code.unflatten(1, self.instance.shape[1:]))


class Meta(msgspec.Struct, kw_only=True):
    """`meta.json`."""

    name: str = ""
    step: int = 0
    network_size: int
    encoding: Literal["positional", "direct", "classification"] = "positional"
    harmonics: int
    fit: str = ""
    split: str = ""
    categories: tuple[Category, ...]

    def code(self) -> Encoding:
        """What the codes are."""
        return make_encoding(self.encoding, self.harmonics)


def save_heads(folder: Path, image: ImageHeads) -> None:
    """Writes `NAME.npz` into a folder that exists; the heads may be on any device."""
    data, segments = io.BytesIO(), image.segments
    np.savez_compressed(
        data,
        instance=image.instance.detach().half().cpu().numpy(),
        semantic=image.semantic.detach().half().cpu().numpy(),
        size=np.array(image.size),
        ids=image.ids,
        seg_id=np.array([segment.id for segment in segments], np.int64),
        seg_category=np.array([segment.category_id for segment in segments], np.int64),
        seg_iscrowd=np.array([segment.iscrowd for segment in segments], np.bool_),
    )
    Storage(str(folder)).write(f"{image.name}.npz", data.getvalue())


def save_meta(folder: Path, meta: Meta) -> None:
    """Writes `meta.json`; InputError where the folder holds heads of another network."""
    if next(folder.glob("*.npz"), None) is not None and read_meta(folder) != meta:
        raise InputError(
            "holds the heads of another network", where=folder, remedy="choose another folder"
        )
    Storage(str(folder)).write(META, json.dumps(msgspec.to_builtins(meta)).encode() + b"\n")


def read_meta(folder: Path) -> Meta:
    """Reads `meta.json`; InputError where it is missing or malformed."""
    where = folder / META
    try:
        meta = decode_json(where.read_bytes(), Meta)
        labels = [category.label for category in meta.categories]
        if labels != [*range(len(labels))]:
            raise msgspec.ValidationError("categories are not listed by label")
        meta.code()
    except OSError as error:
        what = f"no folder of saved heads: {error.strerror}"
        raise InputError(what, where=where, remedy=REMEDY, code="heads-missing") from None
    except ValueError as error:
        raise InputError(f"malformed: {error}", where=where, remedy=REMEDY) from None
    return meta


def in_part(names: Sequence[str], part: Part) -> list[str]:
    """The names of a part, sorted: every second one is for tuning, the others for reporting."""
    ordered = sorted(names)
    return {"all": ordered, "tuning": ordered[::2], "reporting": ordered[1::2]}[part]


def list_heads(folder: Path, part: Part = "all") -> list[Path]:
    """The files of the images of a part; InputError where there are none."""
    names = in_part([path.stem for path in folder.glob("*.npz")], part)
    if not names:
        raise InputError("no saved heads (*.npz)", where=folder, remedy=REMEDY)
    return [folder / f"{name}.npz" for name in names]


def read_heads(paths: Sequence[Path], meta: Meta) -> Iterator[ImageHeads]:
    """Reads images one after the other; InputError where a file is damaged or does not fit."""
    for path in paths:
        try:
            with np.load(path) as file:
                yield _checked(path, {key: file[key] for key in file}, meta)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            what = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else "damaged"
            raise InputError(what, where=path, remedy=REMEDY, code="heads-damaged") from None


def _checked(path: Path, file: dict[str, NDArray[Any]], meta: Meta) -> ImageHeads:
    instance, semantic, ids = file["instance"], file["semantic"], file["ids"]
    table = file["seg_id"], file["seg_category"], file["seg_iscrowd"]
    size, rows = instance.shape[1:], (len(table[0]),)
    heads = [(meta.code().channels, *size), (len(meta.categories), *size)]
    if (
        [instance.shape, semantic.shape] != heads
        or (len(size), ids.ndim) != (2, 2)
        or 0 in (*size, *ids.shape)
        or any(column.shape != rows for column in table)
    ):
        shapes = {key: value.shape for key, value in file.items()}
        raise InputError(f"shapes do not fit {META}: {shapes}", where=path, remedy=REMEDY)
    if not (np.isfinite(instance).all() and np.isfinite(semantic).all()):
        raise InputError("holds NaN or infinite values", where=path, remedy="run it in float32")
    segments = tuple(
        SegmentInfo(int(id_), int(category), bool(crowd))
        for id_, category, crowd in zip(*table, strict=True)
    )
    known = {category.id for category in meta.categories}
    if unknown := {segment.category_id for segment in segments} - known:
        raise InputError(f"unknown category {min(unknown)}", where=path, remedy=REMEDY)
    code, logits = (torch.from_numpy(head).float() for head in (instance, semantic))
    return ImageHeads(path.stem, code, logits, ids.astype(np.int32), segments)
