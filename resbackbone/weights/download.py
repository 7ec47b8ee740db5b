"""One file from one URL: fetched once for all processes of a machine, resumable, verified before it has its name."""

import json
import os
import re
import shutil
import sys
import time
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from resbackbone.atomic import file_digest, write_atomically
from resbackbone.checks import UserError

CHUNK = 1 << 20  # bytes
SILENCE_SECONDS = 30.0  # without a byte, after which a connection counts as dead
ATTEMPTS = 5
PAUSE_SECONDS = 1.0  # before the second attempt; twice as long before each further one
BUSY = {408, 425, 429, 500, 502, 503, 504}  # answers worth asking again after
MAX_BYTES = 32 << 30  # ten times the largest network here, detector and optimizer state included


class _Hash(NamedTuple):
    """A file's hash, or its first hexadecimal digits, lower case."""

    algorithm: str
    digits: str


class _Part:
    """The bytes so far (`NAME.part`), and beside them whose they are (`NAME.part.json`)."""

    def __init__(self, target: Path, url: str):
        self.data = target.with_name(f"{target.name}.part")
        self.about = target.with_name(f"{target.name}.part.json")
        self.url = url

    def start(self, validator: str | None, length: int | None) -> None:
        self.remove()  # so that bytes never stand beside the description of another file
        write_atomically(self.about, json.dumps({"url": self.url, "validator": validator, "length": length}))

    def kept(self) -> tuple[int, str | None, int | None]:
        """How many bytes are there to go on from, the server's name for that state of the file, and its length."""
        try:
            about = json.loads(self.about.read_text(encoding="utf-8"))
            if about["url"] == self.url:
                return self.data.stat().st_size, about["validator"], about["length"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none there, or cut short by the same power failure
        return 0, None, None

    def remove(self) -> None:
        self.data.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def download(url: str, to: str | os.PathLike, *, sha256: str | None = None, md5: str | None = None) -> None:
    """See that the file of `url` (http or https) is at `to`, downloading it if it is not there or damaged.

    `sha256` or `md5` is the published hash or its first hexadecimal digits. Where there is none, the file's sha256 is
    written to `NAME.sha256` when it is downloaded, and held against it ever after; a file put there by hand, without
    either, is taken as it is. Processes that want the same file wait for the one that fetches it, which alone reports
    progress, on stderr. An interrupted download goes on where it stopped if the server's ETag or Last-Modified, or a
    published hash, can tell that the file is still the same. Only a whole file with the right hash gets the name `to`.

    Raises ValueError, one sentence with the URL, the reason and the place for the file, if it cannot be had.
    """
    from filelock import FileLock

    to = Path(to)
    published = _Hash("sha256", sha256.lower()) if sha256 else _Hash("md5", md5.lower()) if md5 else None
    try:
        if _is_intact(to, published):  # without the lock: the folder may be read-only
            return
        to.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(to.with_name(f".{to.name}.lock")):
            if not _is_intact(to, published):
                _fetch(url, to, published)
    except (OSError, HTTPException) as error:  # URLError and HTTPError are OSErrors
        raise _failed(url, to, _reason(error)) from None


def _fetch(url: str, to: Path, published: _Hash | None) -> None:
    part = _Part(to, url)
    resumed = _receive(part, to, published)
    digest = file_digest(part.data, published.algorithm if published else "sha256")
    if published and not digest.startswith(published.digits) and resumed:  # its beginning may be of an older file
        part.remove()
        _receive(part, to, published)
        digest = file_digest(part.data, published.algorithm)
    if published and not digest.startswith(published.digits):
        part.remove()
        raise UserError(
            f"{url} holds a file whose {published.algorithm} is {digest}, where {published.digits} is published, "
            "so it was not kept"
        )
    if not published:  # first, so that no moment leaves a new file beside an old hash
        write_atomically(_record(to), f"{digest}  {to.name}\n")
    os.replace(part.data, to)
    part.remove()


def _receive(part: _Part, to: Path, published: _Hash | None) -> bool:
    """Complete `part`, over several connections at need; returns whether it goes on from bytes of an earlier call."""
    resumed = _offset(part, published)[0] > 0
    problem: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f"  {_reason(problem)}; trying again", file=sys.stderr)
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            _connect(part, to, *_offset(part, published))
            return resumed
        except HTTPError as error:
            if error.code == 416:  # the file has become shorter than our part of it
                part.remove()
            elif error.code not in BUSY:
                raise
            problem = error
        except (URLError, InvalidURL):  # nobody there: no use in knocking again
            raise
        except (ConnectionError, TimeoutError, HTTPException) as error:
            problem = error
    raise _failed(part.url, to, f"{_reason(problem)}, {ATTEMPTS} times")


def _offset(part: _Part, published: _Hash | None) -> tuple[int, str | None, int | None]:
    received, validator, length = part.kept()
    if not (validator or published) or (length is not None and received > length):
        return 0, None, None  # nothing would show that the rest is of another file
    return received, validator, length


def _connect(part: _Part, to: Path, offset: int, validator: str | None, length: int | None) -> None:
    """One connection: appends to `part` what comes. Raises ConnectionError if that is not all."""
    if offset and offset == length:  # killed between the last byte and the rename
        return
    headers = {"User-Agent": "resbackbone", **({"Range": f"bytes={offset}-"} if offset else {})}
    if offset and validator:
        headers["If-Range"] = validator  # a changed file is sent whole
    with _OPENER.open(Request(part.url, headers=headers), timeout=SILENCE_SECONDS) as response:
        if response.headers.get_content_type() == "text/html":
            raise _failed(part.url, to, "the answer is a web page, not a file")
        first, total = _range(response)
        if first and (first != offset or (length is not None and total not in (None, length))):
            part.remove()
            raise ConnectionError("the server sent another part of the file than the one asked for")
        _refuse_size(total, first, to, part.url)
        if not first:
            part.start(_validator(response), total)
        progress = _Progress(part.url, to, total)
        with open(part.data, "ab") as file:
            received = first
            while chunk := response.read1(CHUNK):
                received += len(chunk)
                if total is None:
                    _refuse_size(received, received, to, part.url)
                file.write(chunk)
                progress(received)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received < total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def _range(response: HTTPResponse) -> tuple[int, int | None]:
    """Where in the file the body starts, and the whole file's length in bytes, if the server says so."""
    if response.status != 206:
        return 0, response.length
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not match:
        raise ConnectionError("the server does not say which part of the file it sends")
    first = int(match[1])
    if match[2] != "*":
        return first, int(match[2])
    return first, None if response.length is None else first + response.length


def _validator(response: HTTPResponse) -> str | None:
    """What If-Range may name (RFC 9110, Sec. 13.1.5): a strong ETag, else the date of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _refuse_size(size: int | None, present: int, to: Path, url: str) -> None:
    if size is None:
        return
    if size > MAX_BYTES:
        raise UserError(f"{url} holds {_megabytes(size)}, and no weights file has more than {_megabytes(MAX_BYTES)}")
    free = shutil.disk_usage(to.parent).free
    if size - present > free:
        raise UserError(f"{url} holds {_megabytes(size)}, and only {_megabytes(free)} are free in {to.parent}")


class _HttpOnly(HTTPRedirectHandler):
    """Follows redirects to http and https, and from https to https only."""

    def redirect_request(self, request, file, code, message, headers, new_url):
        scheme = new_url.split(":", 1)[0].lower()
        if scheme not in ("http", "https") or (request.type == "https" and scheme == "http"):
            raise UserError(
                f"{request.full_url} redirects to {new_url}, which is refused: redirects are followed to http and "
                "https only, and never from https to http"
            )
        return super().redirect_request(request, file, code, message, headers, new_url)


_OPENER = build_opener(_HttpOnly)


class _Progress:
    """Lines on stderr: one that rewrites itself on a terminal, one every half minute in a log."""

    def __init__(self, url: str, to: Path, total: int | None):
        self.total, self.terminal = total, sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else 30.0  # seconds
        self.next = time.monotonic() + self.interval
        print(f"downloading {url} ({_megabytes(total) if total else 'size unknown'}) to {to}", file=sys.stderr)

    def __call__(self, received: int) -> None:
        done = received == self.total
        if time.monotonic() < self.next and not (done and self.terminal):
            return
        self.next = time.monotonic() + self.interval
        percent = f"{100 * received / self.total:3.0f}% of {_megabytes(self.total)}" if self.total else ""
        end = "\r" if self.terminal and not done else "\n"
        print(f"  {percent or _megabytes(received)}", end=end, file=sys.stderr, flush=True)


def _is_intact(path: Path, published: _Hash | None) -> bool:
    if not path.is_file():
        return False
    expected = published or _recorded(path)
    return expected is None or file_digest(path, expected.algorithm).startswith(expected.digits)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> _Hash | None:
    try:
        return _Hash("sha256", _record(path).read_text(encoding="utf-8").split()[0])
    except (OSError, UnicodeDecodeError, IndexError):
        return None


def _failed(url: str, to: Path, reason: str) -> ValueError:
    damaged = ", where a damaged one is now" if to.is_file() else ""
    return ValueError(f"{url} could not be downloaded ({reason}); fetch it elsewhere and put it at {to}{damaged}")


def _reason(error: Exception | None) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}".splitlines()[0].strip()
    error = getattr(error, "reason", None) or error
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
