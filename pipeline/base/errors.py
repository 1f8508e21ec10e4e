"""The one exception for what a user can cause and mend."""

from __future__ import annotations

from pathlib import Path


class InputError(Exception):
    """Bad input: one line that says what, where and what to do.

    The command line prints it and exits with 1; the render stage turns it into a line of
    `quarantine.jsonl`. It never carries a traceback to the user.

    Attributes:
        what: What is wrong, in a few words.
        where: The file, image, segment or setting it was seen in; may be empty.
        remedy: What the user can do about it; may be empty.
        code: A short stable name for programs, such as `photo-damaged`.
    """

    def __init__(
        self, what: str, where: str | Path = "", remedy: str = "", code: str = "input"
    ) -> None:
        self.what = what
        self.where = str(where)
        self.remedy = remedy
        self.code = code
        super().__init__(what, self.where, remedy, code)  # as it is pickled between workers

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{place}{self.what}{remedy}"
