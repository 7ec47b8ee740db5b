import hashlib
import multiprocessing
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resbackbone.weights.download import download

CONTENT = os.urandom(300_007)
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server of this machine with one file, that holds its answers until `go` is set."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            http.requests.append(self.path)
            found = self.path == "/file.bin"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(CONTENT) if found else 0))
            self.end_headers()
            http.go.wait(10)
            if found:
                self.wfile.write(CONTENT)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.requests, http.go, http.url = [], threading.Event(), f"http://127.0.0.1:{http.server_port}/file.bin"
    http.go.set()
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield http
    http.go.set()
    http.shutdown()
    http.server_close()


def refusal(*args, **options) -> str:
    with pytest.raises(ValueError) as error:
        download(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("hashes", [{}, {"sha256": SHA256}, {"sha256": SHA256[:8].upper()}, {"md5": MD5[:6]}])
def test_a_file_is_downloaded_once_with_its_hash_checked(server, tmp_path, capfd, hashes):
    to = tmp_path / "new folder" / "file.bin"
    for _ in range(2):
        download(server.url, to, **hashes)
    assert to.read_bytes() == CONTENT and len(server.requests) == 1
    assert capfd.readouterr() == ("", f"downloading {server.url} to {to}\n")


@pytest.mark.parametrize("hashes", [{"sha256": "0" * 8}, {"md5": "0" * 6}])
def test_a_file_with_another_hash_than_published_is_not_kept(server, tmp_path, hashes):
    message = refusal(server.url, tmp_path / "file.bin", **hashes)
    assert server.url in message and "000000 is published" in message
    assert {path.name for path in tmp_path.iterdir()} <= {".file.bin.lock"}


def test_eight_processes_at_once_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    server.go.clear()  # the first is still at it when the last comes
    processes = [context.Process(target=download, args=(server.url, tmp_path / "file.bin")) for _ in range(8)]
    for process in processes:
        process.start()
    time.sleep(0.5)
    assert len(server.requests) == 1 and all(process.is_alive() for process in processes)
    server.go.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(server.requests) == 1 and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_offline_and_without_such_a_file_one_line_says_what_to_fetch_and_where_to_put_it(server, tmp_path):
    to = tmp_path / "file.bin"
    message = refusal(f"{server.url}2", to)
    assert f"{server.url}2 could not be downloaded (404 Not Found)" in message and message.endswith(f"put it at {to}")
    server.shutdown()
    server.server_close()
    assert "Connection refused" in refusal(server.url, to)


def test_a_place_that_cannot_be_written_to_is_one_sentence(server, tmp_path):
    (tmp_path / "file").touch()
    assert "File exists" in refusal(server.url, tmp_path / "file" / "file.bin")
