"""Caches on an HTTP server that fails now and then, lists nothing, or wants a signature."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import Run
from test_stream import SMALL, stream

from panoptic_cache.pipeline.base import remote
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.verify import verify

pytest.importorskip("aiohttp")


class Server(SimpleHTTPRequestHandler):
    """Answers the first requests for each file with a fault."""

    fault: ClassVar[str] = ""
    times: ClassVar[int] = 0  # How often a request for each file fails
    signature: ClassVar[str] = ""
    lists: ClassVar[bool] = True
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        if self.answers():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self.answers():
            super().do_GET()

    def answers(self) -> bool:
        """Whether to answer as usual; else a fault was sent."""
        path, _, query = self.path.partition("?")
        self.asked[f"{self.command} {path}"] += 1
        if query != self.signature or (path.endswith("/") and not self.lists):
            self.send_error(403)
            return False
        if not path.endswith(".tar") or self.asked[f"{self.command} {path}"] > self.times:
            return True
        if self.fault.isdigit():
            self.send_error(int(self.fault))
        elif self.fault == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.fault == "reset":
            self.connection.close()
        else:  # half a body, with a length or, as some proxies do, without
            body = Path(self.translate_path(path)).read_bytes()
            self.send_response(200)
            if self.fault == "cut" or self.command == "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        return False


@pytest.fixture
def url(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a real server on loopback, which fails as its class says."""
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01))
    for name, value in (("fault", ""), ("times", 0), ("signature", ""), ("lists", True)):
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setattr(Server, "asked", Counter())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(cache)))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def keys(url: str) -> set[str]:
    """Of the samples of three rounds of training."""
    config = replace(SMALL, cache=url)
    return {key for batch in islice(stream(config), 9) for key in batch.keys}


FAULTS = ["503", "429", "500", "reset", "cut", "short"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_in_passing_is_tried_again(
    url: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(Server, "fault", fault)
    monkeypatch.setattr(Server, "times", 2)
    assert len(keys(url)) == 12
    Server.asked.clear()
    assert verify(Storage(url), deep=True).problems == []
    assert max(Server.asked.values()) > 2


@pytest.mark.parametrize("fault", [*FAULTS, "404", "403", "loop"])
def test_what_goes_on_failing_is_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(Server, "fault", fault)
    monkeypatch.setattr(Server, "times", 1_000)
    with pytest.raises(InputError) as caught:
        keys(url)
    assert len(str(caught.value).splitlines()) == 1
    assert f"{url}/train-0000" in str(caught.value)
    if fault in {"404", "403"}:
        assert max(Server.asked.values()) == 1, "nothing is gained by asking again"


def test_a_server_that_hangs_is_left(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    monkeypatch.setattr(Server, "do_GET", lambda _: stop.wait(20))
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match="Timeout"):
        Storage(url).read("index.json")
    stop.set()


@pytest.mark.parametrize("signature", ["", "sig=a%2Fb&expires=9"])
def test_a_place_without_a_listing(
    run: Run, url: str, monkeypatch: pytest.MonkeyPatch, signature: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(Server, "lists", False)
    monkeypatch.setattr(Server, "signature", signature)
    place = f"{url}?{signature}" if signature else url
    code, out, _ = run("verify", place, "--deep", "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    code, out, _ = run("inspect", place, "--out", tmp_path / "a.png", "--json")
    assert code == 0
    assert len(keys(place)) == 12


def test_what_a_place_without_a_listing_lacks_is_said(
    run: Run, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "lists", False)
    (cache / "train-00001.tar").unlink()
    (cache / "plan.json").unlink()
    code, out, _ = run("verify", url, "--json")
    found: list[dict[str, Any]] = json.loads(out)["problems"]
    assert code == 1
    assert [(row["shard"], row["problem"]) for row in found] == [
        ("plan.json", "plan missing"),
        ("train-00001", "shard missing"),
    ]
