"""Wall time of the steps that an image goes through."""

from __future__ import annotations

import time


class Clock:
    """Adds up wall time by name."""

    def __init__(self, *names: str) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begins a lap."""
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap, and begins the next."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def per_unit(self, units: int) -> dict[str, float]:
        """Seconds by name, divided by a number of units."""
        return {name: round(seconds / units, 6) for name, seconds in self.seconds.items()}
