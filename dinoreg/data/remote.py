"""Bytes of shards over a network: HTTP that asks again where it broke off, and commands that may not hang."""

from __future__ import annotations

import base64
import http.client
import os
import random
import re
import select
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from dinoreg.data.workers import signals_blocked

SKIP = 1 << 20  # bytes read at a time where those already given come again
HEAD = 512  # bytes by which tarfile tells how a tar is compressed: they must come together


@dataclass(frozen=True)
class Patience:
    """How long a source may be silent, and how often it is asked again."""

    timeout: float = 60.0  # seconds without a byte: for a connection, an answer, and each read
    tries: int = 6  # in succession without a new byte
    wait: float = 1.0  # seconds before the second try, doubled for each one after

    def pause(self, tried: int) -> None:
        """Waits after so many tries; up to half less, by chance, so that many readers do not come back together."""
        time.sleep(self.wait * 2 ** (tried - 1) * random.SystemRandom().uniform(0.5, 1))


class ByteStream(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class Incoming:
    """Bytes as they come: nothing that came before a break is held back."""

    def read(self, size: int, /) -> bytes:
        """Some bytes, at most `size`, none at the end. Raises OSError with one line for people."""
        data = piece = self.read_some(size)
        while piece and len(data) < min(size, HEAD):
            piece = self.read_some(size - len(data))
            data += piece
        return data

    def read_some(self, size: int) -> bytes:
        raise NotImplementedError


class Refused(OSError):
    """The server's answer will not change by asking again."""


class RemoteFile(Incoming):
    """A file over http or https that can be read once, from its start.

    After a stall, a reset, a body that ends early, or status 408, 429 or 5xx it connects again and goes on where it
    was: by a Range request where the server honours one, by skipping what it already gave where not.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self._credentials = _without_credentials(url)
        self.patience = patience
        self.given = 0  # bytes handed out
        self._total: int | None = None  # bytes of the whole file, where the server says
        self._version: tuple[str | None, ...] | None = None
        self._ranges = True  # until an answer to a range request is wrong
        self._tried = 0
        self._answer: Any = None

    def read_some(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end. Raises OSError."""
        while True:
            try:
                if self._answer is None:
                    self._answer = self._connect()
                data: bytes = self._answer.read1(size)
                if not data and self._total is not None and self.given < self._total:
                    raise ConnectionError(f"the body ended after {self.given} of {self._total} bytes")
            except Refused:
                self.close()
                raise
            except (OSError, http.client.HTTPException) as error:
                self.close()
                self._try_again(error)
            else:
                self.given += len(data)
                self._tried = 0
                return data

    def close(self) -> None:
        if self._answer is not None:
            with suppress(OSError):
                self._answer.close()
            self._answer = None

    def _try_again(self, error: Exception) -> None:
        self._tried += 1
        if self._tried >= self.patience.tries:
            raise OSError(f"{self.url}: {_reason(error, self.patience.timeout)}; tried {self._tried} times") from error
        self.patience.pause(self._tried)

    def _connect(self) -> Any:
        """An answer whose next byte is number `given`."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "dinoreg", "Accept-Encoding": "identity"})
        if self._credentials:
            request.add_unredirected_header("Authorization", f"Basic {self._credentials}")
        if self.given and self._ranges:
            request.add_header("Range", f"bytes={self.given}-")
        try:
            answer = urllib.request.urlopen(request, timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 429) or error.code >= 500:
                raise
            raise Refused(f"{self.url}: {_reason(error, 0)}; not tried again") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Refused(f"{self.url}: {error.reason}; not tried again") from error
            raise
        try:
            self._check_version(answer)
            self._skip(answer)
        except BaseException:
            answer.close()
            raise
        return answer

    def _check_version(self, answer: Any) -> None:
        """Raises Refused when the file is no longer the one whose first bytes were given."""
        total = _total_of(answer)
        version = (answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        if self._version is None:
            self._version, self._total = version, total
        elif self.given and (version != self._version or (total or self._total) != (self._total or total)):
            raise Refused(f"{self.url}: changed on the server after {self.given} bytes were read; not tried again")
        else:
            self._version, self._total = version, total

    def _skip(self, answer: Any) -> None:
        if answer.status == 206:
            if _first_of(answer) != self.given:
                self._ranges = False
                raise ConnectionError("the server sent another part than it was asked for")
            return
        left = self.given
        while left:
            data = answer.read(min(left, SKIP))
            if not data:
                raise ConnectionError(f"the body ended after {self.given - left} bytes")
            left -= len(data)


def _without_credentials(url: str) -> tuple[str, str]:
    """The URL without `user:password@`, and these encoded for a header."""
    parts = urllib.parse.urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    encoded = base64.b64encode(urllib.parse.unquote(login).encode()).decode() if at else ""
    return urllib.parse.urlunsplit(parts._replace(netloc=host, fragment="")), encoded


def _content_range(answer: Any) -> re.Match[str] | None:
    return re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))


def _first_of(answer: Any) -> int | None:
    found = _content_range(answer)
    return int(found[1]) if found else None


def _total_of(answer: Any) -> int | None:
    """Bytes of the whole file by the answer's headers."""
    found = _content_range(answer)
    text = found[2] if found else answer.headers.get("Content-Length")
    return int(text) if text and text.isdigit() and (found or answer.status == 200) else None


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}".rstrip()
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no byte for {timeout:g} s"
    text = next(iter(str(cause).strip().splitlines()), "")
    return text or type(cause).__name__


class Command(Incoming):
    """What a command writes to its standard output. `owner` is kept alive, for it may wait for the command."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], patience: Patience, owner: object = None) -> None:
        assert process.stdout is not None
        self.name, self.process, self.patience, self._owner = name, process, patience, owner
        self._out = process.stdout
        self._ready = select.poll()  # not select.select, which knows no descriptors from 1024 on
        self._ready.register(self._out, select.POLLIN | select.POLLHUP)

    def read_some(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end. Raises OSError when the command is silent too long, or has failed."""
        if not self._ready.poll(self.patience.timeout * 1000):
            self.close()
            raise OSError(f"{self.name}: no byte for {self.patience.timeout:g} s; its command was ended")
        data = os.read(self._out.fileno(), size)
        if not data:
            self._check_exit()
        return data

    def _check_exit(self) -> None:
        try:
            code = self.process.wait(self.patience.timeout)
        except subprocess.TimeoutExpired:
            self.close()
            return
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            raise OSError(f"{self.name}: the command ended with {how}")

    def close(self) -> None:
        """Ends the command, and what it has started."""
        self._out.close()
        try:
            self.process.wait(timeout=1.0)  # most end by themselves when nobody listens
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                own_group = os.getpgid(self.process.pid) == self.process.pid
                (os.killpg if own_group else os.kill)(self.process.pid, signal.SIGKILL)
            self.process.wait()


def open_remote(url: str, patience: Patience) -> ByteStream:
    """The bytes of a URL, of a `pipe:` command or of a local file. Raises OSError or ValueError."""
    from webdataset.gopen import Pipe, gopen, rewrite_url  # here, for it brings its own start-up time

    url = rewrite_url(url)
    if url.startswith(("http://", "https://")):
        return RemoteFile(url, patience)
    # Commands outlive a signal to the whole job step, as the workers do that read them: the last step needs its images.
    with signals_blocked():
        if url.startswith("pipe:"):
            command = url.removeprefix("pipe:")
            process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
            return Command(url, process, patience)
        opened = gopen(url)
    return Command(url, opened.proc, patience, owner=opened) if isinstance(opened, Pipe) else opened
