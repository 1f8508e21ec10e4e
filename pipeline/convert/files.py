"""Photos and maps below folders, and what annotations and other files call them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.photo import SUFFIXES

MAPS = (".png", ".tif", ".tiff", ".bmp")
"""Suffixes of maps and masks, in lower case."""
ENDINGS = ("", "_masks", "_mask", "_labels", "_label", "_labelids", "_cp_masks", "_gt", "_seg")
"""What stands behind a photo's name in its map's name; the first that is there is taken."""
PHOTO_ENDING = "_img"
"""What may stand behind it in the photo's."""


def walk(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The files of a kind below a folder, as sorted relative paths; none that start with a dot.

    InputError where there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise InputError("no such folder", where=folder)
    found = []
    for top, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(top) / name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    if not found:
        raise InputError(f"no file ends in {', '.join(suffixes)}", where=folder)
    return sorted(found)


def image_ids(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, name) of photos that have no id: the path without suffix where that is unique."""
    names = [*names]
    times = Counter(without_suffix(name) for name in names)
    for name in names:
        short = without_suffix(name)
        yield (short if times[short] == 1 else name), name


def without_suffix(name: str) -> str:
    """A relative path without the suffix of its last part."""
    return Path(name).with_suffix("").as_posix()


class Paths:
    """The files below a folder, found by what annotations call them."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self._names = {name.casefold(): name for name in names}
        self._ends: dict[str, list[str]] = {}
        for name in self._names.values():
            self._ends.setdefault(Path(name).name.casefold(), []).append(name)

    def find(self, called: str) -> str:
        """The relative path of a file; InputError where it is missing or not the only one.

        Backslashes are slashes, case does not matter, and folders in front may be missing or other
        ones: exports have the paths of another machine.
        """
        parts = [part for part in called.replace("\\", "/").split("/") if part not in {"", "."}]
        for start in range(len(parts)):
            name = self._names.get("/".join(parts[start:]).casefold())
            if name is not None:
                return name
        names = self._ends.get(parts[-1].casefold(), []) if parts else []
        if len(names) == 1:
            return names[0]
        if names:
            raise InputError(
                f"{called} is {len(names)} files, such as {names[0]} and {names[1]}",
                remedy="give the folder that its path starts in",
                code="photo-ambiguous",
            )
        raise InputError("photo missing", where=self.folder / called, code="photo-missing")


def pair_maps(images: Path, maps: Path) -> tuple[list[tuple[str, Path]], list[Rejection]]:
    """Photos, by relative path, and the map of each; and what has no partner.

    Both may lie in one folder. A map has the path of its photo, or its name alone, before one of
    `ENDINGS` and a suffix.
    """
    named = {without_suffix(name).casefold(): maps / name for name in walk(maps, MAPS)}
    times = Counter(Path(name).name for name in named)
    alone = {Path(name).name: path for name, path in named.items() if times[Path(name).name] == 1}
    photos = walk(images, SUFFIXES)
    stems = {without_suffix(name).casefold() for name in photos}
    pairs, lonely, used = [], [], set()
    for name in photos:
        stem = without_suffix(name).casefold()
        if images.samefile(maps) and _photo_of(stem) & stems:
            continue  # it is a map
        bases = (stem, stem.removesuffix(PHOTO_ENDING))
        keys = [f"{base}{ending}" for base in bases for ending in ENDINGS]
        found = [named[key] for key in keys if key in named]
        found += [alone[Path(key).name] for key in keys if Path(key).name in alone]
        found = [path for path in found if path != images / name]
        if found:
            pairs.append((name, found[0]))
            used.add(found[0])
        else:
            lonely.append(_lonely(name, "its map is missing", maps, "map-missing"))
    for path in sorted({*named.values()} - used - {images / name for name in photos}):
        name = path.relative_to(maps).as_posix()
        lonely.append(_lonely(name, "its photo is missing", images, "photo-missing"))
    return pairs, lonely


def _photo_of(stem: str) -> set[str]:
    """What the photo of a map may be called."""
    bases = {stem.removesuffix(ending) for ending in ENDINGS if stem.endswith(ending)} - {stem}
    return bases | {f"{base}{PHOTO_ENDING}" for base in bases}


def _lonely(name: str, problem: str, folder: Path, code: str) -> Rejection:
    return Rejection(without_suffix(name), name, code, f"{problem} in {folder.name}")
