import hashlib
import multiprocessing
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from resbackbone.weights import download as module
from resbackbone.weights.download import download

CONTENT = os.urandom(300_007)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = os.urandom(300_007)


class Server:
    """A file on a server of this machine, and every way in which a test wants it to misbehave."""

    def __init__(self):
        self.content = CONTENT
        self.ranges = True  # whether it knows Range and If-Range
        self.etag: str | None = '"1"'
        self.heeds_if_range = True
        self.shift: list[int] = []  # how far off the next parts it sends are
        self.cut: list[int] = []  # bytes after which the next answers end, one each
        self.status: list[int] = []  # what the next answers are instead
        self.redirect: str | None = None
        self.length: str | None = None  # Content-Length to claim
        self.content_type = "application/octet-stream"
        self.hold = threading.Event()  # until it is set, answers stop in the middle
        self.hold.set()
        self.requests: list[dict[str, str]] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients that hang up are what this is for
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"

    def handler(server):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                server.requests.append(dict(self.headers))
                if server.redirect:
                    self.answer(302, Location=server.redirect)
                elif server.status:
                    self.answer(server.status.pop(0))
                else:
                    self.send_file()

            def send_file(self):
                content, first = server.content, 0
                wanted = self.headers.get("Range")
                same = not server.heeds_if_range or self.headers.get("If-Range") in (None, server.etag)
                if server.ranges and wanted and same:
                    first = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    first += server.shift.pop(0) if server.shift else 0
                if first and first >= len(content):
                    self.answer(416)
                    return
                headers = {"Content-Type": server.content_type}
                headers["Content-Length"] = server.length or str(len(content) - first)
                if server.etag:
                    headers["ETag"] = server.etag
                if first:
                    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self.answer(206 if first else 200, **headers)
                end = first + server.cut.pop(0) if server.cut else len(content)
                middle = (first + end) // 2
                self.wfile.write(content[first:middle])
                self.wfile.flush()
                server.hold.wait(10)
                self.wfile.write(content[middle:end])

            def answer(self, status, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

        return Handler

    def ranges_asked(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    server = Server()
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.hold.set()
    server.http.shutdown()
    server.http.server_close()


def leave_a_part(server, to, size=100_000) -> None:
    """As a process does that dies after `size` bytes: every attempt but the first gets nothing."""
    server.cut = [size]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError):
        patch.setattr(module, "ATTEMPTS", 1)
        download(server.url, to)
    assert to.with_name(f"{to.name}.part").stat().st_size == size and not to.exists()
    server.requests.clear()


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def refusal(*args, **options) -> str:
    with pytest.raises(ValueError) as error:
        download(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_is_there_whole_and_reported_on_stderr(server, tmp_path, capfd):
    to = tmp_path / "new folder" / "file.bin"
    download(server.url, to, sha256=SHA256)
    assert to.read_bytes() == CONTENT
    assert visible(to.parent) == {"file.bin"}
    out, err = capfd.readouterr()
    assert not out and f"downloading {server.url} (0.3 MB) to {to}" in err


def test_an_existing_copy_is_not_asked_for_again(server, tmp_path, capfd):
    to = tmp_path / "file.bin"
    to.write_bytes(CONTENT)
    download(server.url, to, sha256=SHA256[:8].upper())
    download(server.url, to, md5=hashlib.md5(CONTENT).hexdigest()[:6])
    download(server.url, to)  # put there by hand, and nothing to hold it against
    assert not server.requests and capfd.readouterr() == ("", "")


def test_a_damaged_copy_is_replaced(server, tmp_path):
    to = tmp_path / "file.bin"
    to.write_bytes(OTHER)
    download(server.url, to, sha256=SHA256[:8])
    assert to.read_bytes() == CONTENT


@pytest.mark.parametrize("published", ["sha256", "md5"])
def test_a_file_with_another_hash_than_published_is_not_kept(server, tmp_path, published):
    server.content = OTHER
    digest = hashlib.new(published, CONTENT).hexdigest()[:8]
    message = refusal(server.url, tmp_path / "file.bin", **{published: digest})
    assert server.url in message and digest in message and hashlib.new(published, OTHER).hexdigest() in message
    assert visible(tmp_path) == set()


def test_without_a_published_hash_the_first_one_is_recorded_and_held(server, tmp_path):
    to = tmp_path / "file.bin"
    download(server.url, to)
    assert (tmp_path / "file.bin.sha256").read_text() == f"{SHA256}  file.bin\n"  # as sha256sum -c reads it
    download(server.url, to)
    assert len(server.requests) == 1
    to.write_bytes(CONTENT[:-1])
    download(server.url, to)
    assert to.read_bytes() == CONTENT and len(server.requests) == 2


def test_a_connection_that_ends_early_is_taken_up_where_it_stopped(server, tmp_path):
    server.cut = [1_000, 2_000]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges_asked() == [None, "bytes=1000-", "bytes=3000-"]


def test_a_server_without_ranges_is_asked_for_everything_again(server, tmp_path):
    server.ranges, server.cut = False, [1_000]
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and len(server.requests) == 2


def test_a_server_that_always_hangs_up_is_given_up(server, tmp_path):
    server.cut = [10] * 100
    message = refusal(server.url, tmp_path / "file.bin")
    assert "50 of 300007 bytes, 5 times" in message and str(tmp_path / "file.bin") in message
    assert visible(tmp_path) == {"file.bin.part", "file.bin.part.json"}


@pytest.mark.parametrize("etag", ['"1"', None])
def test_a_later_call_goes_on_from_what_an_earlier_one_left(server, tmp_path, etag):
    server.etag = etag
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    download(server.url, to, sha256=None if etag else SHA256)
    assert to.read_bytes() == CONTENT
    assert server.ranges_asked() == ["bytes=100000-"]


def test_a_file_that_changed_meanwhile_starts_anew(server, tmp_path):
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    server.content, server.etag = OTHER, '"2"'
    download(server.url, to)
    assert to.read_bytes() == OTHER


def test_a_file_of_another_length_starts_anew_where_the_server_does_not_heed_if_range(server, tmp_path):
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    server.content, server.heeds_if_range = OTHER[:-1], False
    download(server.url, to)
    assert to.read_bytes() == OTHER[:-1]


def test_another_part_than_the_one_asked_for_is_not_taken(server, tmp_path):
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    server.shift = [-1]
    download(server.url, to)
    assert to.read_bytes() == CONTENT


def test_where_nothing_would_show_a_change_nothing_is_resumed(server, tmp_path):
    server.etag = None
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    server.content = OTHER
    download(server.url, to)
    assert to.read_bytes() == OTHER and server.ranges_asked() == [None]


@pytest.mark.parametrize("content", [OTHER, OTHER[:200_000], OTHER[:50_000]], ids=["as long", "shorter", "too short"])
def test_a_part_of_another_file_is_found_out_by_the_published_hash(server, tmp_path, content):
    server.etag = None  # so that only the hash can tell
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    server.content = content
    download(server.url, to, sha256=hashlib.sha256(content).hexdigest())
    assert to.read_bytes() == content and visible(tmp_path) == {"file.bin"}


def test_a_part_of_another_url_is_not_gone_on_from(server, tmp_path):
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    server.url += "?other"
    download(server.url, to, sha256=SHA256)
    assert server.ranges_asked() == [None]


def test_a_part_that_is_already_whole_only_gets_its_name(server, tmp_path):
    to = tmp_path / "file.bin"
    leave_a_part(server, to)
    to.with_name("file.bin.part").write_bytes(CONTENT)
    download(server.url, to)
    assert to.read_bytes() == CONTENT and not server.requests


def test_a_process_killed_in_the_middle_leaves_no_file_and_the_next_goes_on(server, tmp_path):
    to, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    server.hold.clear()
    process = multiprocessing.get_context("fork").Process(target=download, args=(server.url, to))
    process.start()
    deadline = time.monotonic() + 10
    while (not part.exists() or part.stat().st_size < 100_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    received = part.stat().st_size
    assert received >= 100_000 and not to.exists()
    server.hold.set()
    download(server.url, to)
    assert to.read_bytes() == CONTENT
    assert server.ranges_asked() == [None, f"bytes={received}-"]


def test_eight_processes_at_once_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    server.hold.clear()  # the first is still at it when the last comes
    processes = [context.Process(target=download, args=(server.url, tmp_path / "file.bin")) for _ in range(8)]
    for process in processes:
        process.start()
    time.sleep(0.5)
    assert len(server.requests) == 1 and all(process.is_alive() for process in processes)
    server.hold.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(server.requests) == 1 and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.status = [503, 429]
    download(server.url, tmp_path / "file.bin")
    assert len(server.requests) == 3
    server.status = [404, 404]
    assert "the server answers 404 Not Found" in refusal(server.url, tmp_path / "none.bin")
    assert len(server.requests) == 4


def test_offline_one_line_says_what_to_fetch_and_where_to_put_it(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    to = tmp_path / "file.bin"
    message = refusal(server.url, to)
    assert server.url in message and message.endswith(f"put it at {to}") and "Connection refused" in message
    to.write_bytes(OTHER)
    assert refusal(server.url, to, sha256=SHA256).endswith("where a damaged one is now")


def test_a_server_that_falls_silent_is_not_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    server.hold.clear()
    assert "timed out, 2 times" in refusal(server.url, tmp_path / "file.bin")


def test_a_redirect_to_http_is_followed(server, tmp_path):
    first = Server()
    first.redirect = server.url
    threading.Thread(target=first.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    download(first.url, tmp_path / "file.bin", sha256=SHA256)
    first.http.shutdown()
    first.http.server_close()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/file.bin", "data:,abc"])
def test_a_redirect_to_anything_but_http_is_refused(server, tmp_path, target):
    server.redirect = target
    message = refusal(server.url, tmp_path / "file.bin")
    assert target in message and ("refused" in message or "not allowed" in message)
    assert len(server.requests) == 1 and visible(tmp_path) == set()


def test_a_redirect_from_https_to_http_is_refused():
    request = module.Request("https://host/file.bin")
    with pytest.raises(ValueError, match="never from https to http"):
        module._HttpOnly().redirect_request(request, None, 302, "Found", {}, "http://host/file.bin")


def test_a_size_beyond_reason_or_beyond_the_disk_is_refused(server, tmp_path, monkeypatch):
    server.length = str(10**15)
    assert "1,000,000,000.0 MB, and no weights file has" in refusal(server.url, tmp_path / "file.bin")
    monkeypatch.setattr(module, "MAX_BYTES", 10**16)
    assert f"are free in {tmp_path}" in refusal(server.url, tmp_path / "file.bin")
    assert visible(tmp_path) == set()


def test_an_answer_of_unknown_length_ends_at_the_largest_size(server, tmp_path, monkeypatch):
    server.length = "unknown"
    download(server.url, tmp_path / "file.bin", sha256=SHA256)
    monkeypatch.setattr(module, "MAX_BYTES", 200_000)
    assert "no weights file has" in refusal(server.url, tmp_path / "other.bin")
    assert not (tmp_path / "other.bin").exists()


def test_a_web_page_is_not_taken_for_the_file(server, tmp_path):
    server.content_type = "text/html; charset=utf-8"
    assert "a web page, not a file" in refusal(server.url, tmp_path / "file.bin")
    assert visible(tmp_path) == set()


def test_a_place_that_cannot_be_written_to_is_one_sentence(server, tmp_path):
    (tmp_path / "file").touch()
    assert "File exists" in refusal(server.url, tmp_path / "file" / "file.bin")
