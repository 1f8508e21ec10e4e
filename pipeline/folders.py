"""The files that annotations name: kept inside their folder, and looked for where they are not."""

from __future__ import annotations

import errno
import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import cannot_read

log = logging.getLogger(__name__)


class Folder:
    """A folder of photos or panoptic PNGs.

    Each folder in it is listed once: a stat for every file takes minutes on a network disk.
    """

    def __init__(self, path: Path, kind: str, *, follow_links: bool = False) -> None:
        self.path = path.absolute()
        self.kind = kind  # "photo" or "panoptic PNG"
        self._code = kind.rpartition(" ")[2].lower()
        self._root = os.path.realpath(path)
        self._follow_links = follow_links
        self._listings: dict[str, dict[str, bool]] = {}
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
        is_link = self._listing(path.parent, name).get(path.name)
        if is_link and not self._is_inside(path):
            raise self._outside(name)
        if is_link is None or (is_link and not path.exists()):
            other = self._look(name)
            raise InputError(
                f"{self.kind} missing",
                where=path,
                remedy=f"is it {other}?" if other and other != name else "",
                code=f"{self._code}-missing",
            )
        return path

    def guess(self, names: Sequence[str]) -> list[str]:
        """Where most files are missing, takes the ones that the names most likely mean.

        That is only done where there is exactly one for each that is missing. Exports tell paths of
        other machines, with other folders in front, backslashes, or another form of the suffix or
        of Unicode; Cityscapes' official JSON has `_gtFine_` in the names of photos. Returns the
        names that are still missing.
        """
        missing = [name for name in names if name not in self._plain and not self._is_there(name)]
        found = {name: other for name in missing if (other := self._look(name))}
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

    def _listing(self, folder: Path, name: str) -> dict[str, bool]:
        """The names in a folder, and whether each is a link; none where it cannot be listed."""
        listing = self._listings.get(str(folder))
        if listing is None:
            if not self._is_inside(folder):
                raise self._outside(name)
            try:
                with os.scandir(folder) as entries:
                    listing = {entry.name: entry.is_symlink() for entry in entries}
            except ValueError:  # no name that a folder can have
                listing = {}
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
                    raise cannot_read(error, folder) from None
                listing = {}
            self._listings[str(folder)] = listing
        return listing

    def _is_inside(self, path: Path) -> bool:
        if self._follow_links:
            return True
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):
            return True  # it is not there
        return real == self._root or real.startswith(os.path.join(self._root, ""))  # noqa: PTH118

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
        return {name for name, is_link in self._listing(self.path, "").items() if not is_link}

    def _look(self, name: str) -> str | None:
        """The one file here that a name most likely means, as a relative path."""
        listed = PurePosixPath(name.replace("\\", "/"))

        def likeness(path: str) -> tuple[bool, int]:
            there = PurePosixPath(path)
            same = zip(reversed(listed.parent.parts), reversed(there.parent.parts), strict=False)
            common = next((n for n, (a, b) in enumerate(same) if a != b), len(listed.parts))
            return listed.suffix.lower() == there.suffix.lower(), common

        ranked = sorted(self._by_stem.get(_stem(listed.name), ()), key=likeness)
        if not ranked or (len(ranked) > 1 and likeness(ranked[-1]) == likeness(ranked[-2])):
            return None
        return ranked[-1]

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for top, _, names in os.walk(self.path, followlinks=self._follow_links):
            for name in names:
                path = Path(top, name).relative_to(self.path).as_posix()
                found[_stem(name)].append(path)
        return found


def _stem(name: str) -> str:
    """What is left of a file's name without what tools write in different ways."""
    plain = unicodedata.normalize("NFC", name).casefold().replace("_gtfine_", "_")
    return plain.rpartition(".")[0] or plain


def is_file(path: Path) -> bool:
    """Whether a file is there; False for a name that no file can have."""
    with suppress(OSError):
        return path.is_file()
    return False
