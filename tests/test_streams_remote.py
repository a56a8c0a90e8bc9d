"""Shards over HTTP from a real server that stalls, fails, breaks off, ignores ranges, changes the file."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_data_sources import write_shards

from dinoreg.data.images import BadImage
from dinoreg.data.remote import Patience, RemoteFile
from dinoreg.data.streams import Stream, read_shard

BODY = bytes(range(256)) * 400
SOON = Patience(timeout=0.5, tries=4, wait=0.01)


class Server(http.server.ThreadingHTTPServer):
    """Gives `body` at any path; `mishaps` are taken one an answer, then all is well."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.mishaps, self.ranges, self.tag = BODY, [], True, '"one"'
        self.asked: list[str | None] = []  # the Range header of each request
        self.logins: list[str | None] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"

    def handle_error(self, *_: object) -> None:
        pass  # clients go away


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.headers["Range"])
        self.server.logins.append(self.headers["Authorization"])
        mishap = self.server.mishaps.pop(0) if self.server.mishaps else ""
        if mishap.isdigit():
            self.send_error(int(mishap))
        elif mishap == "moved":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        elif mishap == "silent":
            self.server.over.wait(30)
        else:
            self.answer(mishap)

    def answer(self, mishap: str) -> None:
        body, first = self.server.body, 0
        if self.headers["Range"] and self.server.ranges:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        claimed = first + 7 if mishap == "wrong range" else first
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {claimed}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", self.server.tag)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        rest = body[first:]
        self.wfile.write(rest if mishap in ("", "wrong range") else rest[: len(rest) // 2])
        self.wfile.flush()
        if mishap == "stall":
            self.server.over.wait(30)
        if mishap == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()


@contextmanager
def serving(*mishaps: str) -> Iterator[Server]:
    with Server() as server:
        server.mishaps = list(mishaps)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def read_all(url: str) -> bytes:
    file, pieces = RemoteFile(url, SOON), []
    while piece := file.read(10_000):
        pieces.append(piece)
    file.close()
    return b"".join(pieces)


def error_of(server: Server, during: str = "") -> str:
    with pytest.raises(OSError) as caught:
        read_all(server.url)
    message = str(caught.value)
    assert message.startswith(server.url) and "\n" not in message
    return message


@pytest.mark.parametrize(
    "mishaps",
    [
        [],
        ["half"],
        ["half", "half", "half", "half"],  # each brings something new
        ["stall"],
        ["reset", "stall", "half"],
        ["500", "503"],
        ["429", "408"],
        ["half", "500", "502", ""],
        ["silent", "silent", ""],
        ["moved"],
        ["half", "moved", "moved"],
    ],
)
def test_a_file_arrives_whole_whatever_happens_on_the_way(mishaps) -> None:
    with serving(*mishaps) as server:
        assert read_all(server.url) == BODY
        assert not server.mishaps


def test_it_goes_on_where_it_broke_off() -> None:
    with serving("half", "stall") as server:
        assert read_all(server.url) == BODY
        size = len(BODY)
        assert server.asked == [None, f"bytes={size // 2}-", f"bytes={size // 2 + size // 4}-"]


def test_a_server_without_ranges_is_read_from_the_start_again() -> None:
    with serving("half", "500") as server:
        server.ranges = False
        assert read_all(server.url) == BODY


def test_a_wrong_range_is_not_believed() -> None:
    with serving("half", "wrong range") as server:
        assert read_all(server.url) == BODY
        assert server.asked[2] is None


def test_a_server_that_never_gets_past_the_middle() -> None:
    with serving(*["half"] * 10) as server:
        server.ranges = False
        assert f"the body ended after {len(BODY) // 2} of {len(BODY)} bytes; tried 4 times" in error_of(server)
        assert len(server.asked) == 4


def test_a_server_that_goes_on_failing() -> None:
    with serving(*["500"] * 10) as server:
        assert "the server answers 500 Internal Server Error; tried 4 times" in error_of(server)
        assert len(server.asked) == 4


def test_a_server_that_says_nothing() -> None:
    with serving(*["silent"] * 10) as server:
        began = time.monotonic()
        assert "no byte for 0.5 s; tried 4 times" in error_of(server)
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("status", ["404", "403", "410"])
def test_what_asking_again_does_not_change_is_not_asked_again(status) -> None:
    with serving(*[status] * 10) as server:
        assert f"the server answers {status}" in error_of(server)
        assert len(server.asked) == 1


def test_nobody_listens() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(OSError, match=r"Connection refused; tried 4 times"):
        read_all(url)


@pytest.mark.parametrize("change", ["tag", "length"])
def test_a_file_that_changes_meanwhile_is_given_up(change) -> None:
    with serving("half") as server:
        file = RemoteFile(server.url, SOON)
        file.read(100)
        if change == "tag":
            server.tag = '"two"'
        else:
            server.body = BODY + b"more"
        with pytest.raises(OSError, match="changed on the server after") as caught:
            while file.read(10_000):
                pass
        assert "\n" not in str(caught.value)


def test_a_password_goes_into_the_header_and_into_no_message() -> None:
    with serving(*["500"] * 4) as server:
        secret = server.url.replace("http://", "http://me:se%40cret@")
        with pytest.raises(OSError) as caught:
            read_all(secret)
        assert "cret" not in str(caught.value)
        assert read_all(secret) == BODY
        assert server.logins[-1] == "Basic bWU6c2VAY3JldA=="


def test_images_before_a_break_are_kept_and_a_later_pass_tries_again(tmp_path) -> None:
    write_shards(tmp_path, [9])
    with serving("half", "404", "404") as server:
        server.body = (tmp_path / "s-000.tar").read_bytes()
        found = [data for _, data in read_shard(server.url, SOON)]
        assert found[:3] == [b"0", b"1", b"2"] and isinstance(found[-1], BadImage) and found[-1].reason == "unreachable"
        assert 3 < len(found) < 10
        other = f"pipe:cat {tmp_path}/s-000.tar"
        stream = Stream([server.url, other], 1, key=0, consumer=0, consumers=1, patience=SOON)
        entries = [stream.next() for _ in range(40)]
    failed = [entry for entry in entries if isinstance(entry.data, BadImage)]
    assert [entry.url for entry in failed] == [server.url]
    assert sum(entry.url == server.url for entry in entries) > 9


def test_shards_of_a_plain_server(tmp_path: Path) -> None:
    write_shards(tmp_path, [6])
    with serving() as server:
        server.body = (tmp_path / "s-000.tar").read_bytes()
        stream = Stream([server.url], 1, key=0, consumer=0, consumers=1, patience=SOON)
        assert sorted(int(stream.next().read()) for _ in range(6)) == list(range(6))
