"""Surroundings that go wrong: a disk that is too small, a server that is slow."""

import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def small_disk(place: Path, size: int):
    """A file system of `size` bytes at `place`; False where this user may not mount one."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def slow_server(folder: Path):
    """A file server on this machine that sends 4 MB a second; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            while block := source.read(1 << 16):
                with suppress(OSError):
                    outputfile.write(block)
                time.sleep(1 / 64)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
