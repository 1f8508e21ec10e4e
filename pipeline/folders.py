"""The files that annotations name: kept inside their folder, and looked for where they are not."""

from __future__ import annotations

import errno
import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import cannot_read

log = logging.getLogger(__name__)


class Folder:
    """A folder of photos, maps or panoptic PNGs.

    Each folder in it is listed once: a stat for every file takes minutes on a network disk.
    """

    def __init__(self, path: Path, kind: str, *, follow_links: bool = False) -> None:
        self.path = path.absolute()
        self.kind = kind  # Such as "photo" or "panoptic PNG"
        self._code = kind.rpartition(" ")[2].lower()
        self._follow_links = follow_links
        self._listings: dict[str, dict[str, os.DirEntry[str]]] = {}
        self._guesses: dict[str, str] = {}

    def find(self, name: str) -> Path:
        """The path of a file; InputError where it is missing or lies elsewhere."""
        if name in self._plain:  # by far the most
            return self.path / name
        name_here = self._guesses.get(name, name)
        if os.path.isabs(name_here):  # noqa: PTH117 (of text)
            name_here = os.path.relpath(name_here, self.path)
        path = self.path / os.path.normpath(name_here)
        if self.path not in path.parents or ".." in path.relative_to(self.path).parts:
            raise self._outside(name)
        entry = self._listing(path.parent, name).get(path.name)
        is_link = entry is not None and entry.is_symlink()
        if is_link and not self._is_inside(path):
            raise self._outside(name)
        if entry is None or (is_link and not path.exists()):
            others = self._look(name)
            raise InputError(
                f"{self.kind} missing",
                where=path,
                remedy=f"is it {others[0]}?" if len(others) == 1 and others != [name] else "",
                code=f"{self._code}-missing",
            )
        return path

    def find_like(self, called: str) -> str:
        """The relative path of the file that a name means; InputError where none or several fit.

        Exports have paths of another machine: backslashes are slashes, case does not matter, and
        folders in front may be missing or other ones.
        """
        suffix = PurePosixPath(called).suffix.casefold()
        found = [name for name in self._look(called) if Path(name).suffix.casefold() == suffix]
        if not found:
            where = self.path / called
            raise InputError(f"{self.kind} missing", where=where, code=f"{self._code}-missing")
        if len(found) > 1:
            raise InputError(
                f"{called} is {len(found)} files, such as {found[0]} and {found[1]}",
                remedy="give the folder that its path starts in",
                code=f"{self._code}-ambiguous",
            )
        self.find(found[0])  # no link that leads out
        return found[0]

    def files(self, suffixes: tuple[str, ...]) -> list[str]:
        """The files of a kind here and below, as sorted relative paths; none that is hidden.

        InputError where there is no such folder, or nothing in it.
        """
        if not self.path.is_dir():
            raise InputError("no such folder", where=self.path)
        found = sorted(name for name in self._files if name.lower().endswith(suffixes))
        if not found:
            raise InputError(f"no file ends in {', '.join(suffixes)}", where=self.path)
        return found

    def guess(self, names: Sequence[str]) -> list[str]:
        """Where most files are missing, takes the ones that the names most likely mean.

        That is only done where there is exactly one for each that is missing. Exports tell paths of
        other machines, with other folders in front, backslashes, or another form of the suffix or
        of Unicode; Cityscapes' official JSON has `_gtFine_` in the names of photos. Returns the
        names that are still missing.
        """
        missing = [name for name in names if name not in self._plain and not self._is_there(name)]
        found = {name: each[0] for name in missing if len(each := self._look(name)) == 1}
        all_found = len({*found.values()}) == len({*missing})
        if 2 * len(missing) <= len(names) or not all_found:
            return missing
        self._guesses = found
        log.warning(
            "%s: %d of %d file names are not there; %s is taken to be %s, the others alike",
            *(self.path, len(missing), len(names), missing[0], found[missing[0]]),
        )
        return []

    def _is_there(self, name: str) -> bool:
        try:
            self.find(name)
        except InputError as error:
            return not error.code.endswith("-missing")
        return True

    def _listing(self, folder: Path, name: str) -> dict[str, os.DirEntry[str]]:
        """What is in a folder, by name; nothing where it cannot be listed."""
        listing = self._listings.get(str(folder))
        if listing is None:
            if not self._is_inside(folder):
                raise self._outside(name)
            listing = {}
            try:
                with suppress(ValueError), os.scandir(folder) as entries:  # no name of a folder
                    listing = {entry.name: entry for entry in entries}
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
                    raise cannot_read(error, folder) from None
            self._listings[str(folder)] = listing
        return listing

    def _is_inside(self, path: Path) -> bool:
        with suppress(OSError, ValueError):  # it is not there
            return self._follow_links or _contains(self._root, os.path.realpath(path))
        return True

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.path)

    def _outside(self, name: str) -> InputError:
        return InputError(
            f"{self.kind} {name} lies outside its folder",
            where=self.path,
            remedy="move it there; links are followed with --follow-links",
            code="file-outside",
        )

    @cached_property
    def _plain(self) -> set[str]:
        """What lies in the folder itself and is no link."""
        listing = self._listing(self.path, "")
        return {name for name, entry in listing.items() if not entry.is_symlink()}

    def _look(self, name: str) -> list[str]:
        """The file here that a name most likely means, relative; several where they are alike."""
        listed = PurePosixPath(_folded(name.replace("\\", "/")))

        def likeness(path: str) -> tuple[bool, bool, bool, int]:
            there = PurePosixPath(_folded(path))
            above = zip(reversed(listed.parent.parts), reversed(there.parent.parts), strict=False)
            same = [one == other for one, other in above]
            common = (*same, False).index(False)
            return path == name, listed.suffix == there.suffix, all(same), common

        found = self._by_stem.get(_stem(listed.name), ())
        best = max(map(likeness, found), default=None)
        return [path for path in found if likeness(path) == best]

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for path in sorted(self._files):
            found[_stem(_folded(PurePosixPath(path).name))].append(path)
        return found

    @cached_property
    def _files(self) -> list[str]:
        """All files here and below, hidden ones left out, as relative paths."""
        return [*self._walk(self.path)]

    def _walk(self, folder: Path) -> Iterator[str]:
        try:
            listing = self._listing(folder, "")
        except InputError as error:
            log.warning("%s", error)
            return
        for name, entry in listing.items():
            path, is_link = folder / name, entry.is_symlink()
            if name.startswith("."):
                continue
            if not (path.is_dir() if is_link else entry.is_dir()):
                yield path.relative_to(self.path).as_posix()
            elif is_link and not self._is_inside(path):
                log.warning("%s leads out of its folder: see --follow-links", path)
            elif not is_link or not _contains(os.path.realpath(path), os.path.realpath(folder)):
                yield from self._walk(path)  # but for links to what they lie in


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))  # noqa: PTH118 (of text)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _stem(folded: str) -> str:
    """What is left of a file's name without what tools write in different ways."""
    plain = folded.replace("_gtfine_", "_")
    return plain.rpartition(".")[0] or plain


def is_file(path: Path) -> bool:
    """Whether a file is there; False for a name that no file can have."""
    with suppress(OSError):
        return path.is_file()
    return False
