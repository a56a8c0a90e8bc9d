"""A web server that behaves badly in a chosen way."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Behaviour = Literal["well", "errors", "half", "half-without-ranges", "stall"]
STALL = 120.0  # seconds


class Shop(ThreadingHTTPServer):
    """Serves the files of a folder. asked: requests by path."""

    daemon_threads = True

    def __init__(self, folder: Path, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.behaviour = folder, behaviour
        self.asked: Counter[str] = Counter()
        self.broken = 0  # answers that were not as they should be
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Shop

    def do_GET(self) -> None:
        shop = self.server
        shop.asked[self.path] += 1
        data = (shop.folder / self.path.lstrip("/")).read_bytes()
        bad = shop.behaviour != "well" and shop.asked[self.path] == 1  # the first request for each file
        shop.broken += bad
        if bad and shop.behaviour == "errors":
            self.send_error(500)
            return
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked and shop.behaviour != "half-without-ranges" else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first : first + (len(data) - first) // 2] if bad else data[first:])
        self.wfile.flush()
        if bad and shop.behaviour == "stall":
            shop.closing.wait(STALL)

    def log_message(self, format: str, *args: object) -> None:
        """In silence."""


@contextmanager
def shop(folder: Path, behaviour: Behaviour) -> Iterator[Shop]:
    """A server for as long as the context lasts."""
    server = Shop(folder, behaviour)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
