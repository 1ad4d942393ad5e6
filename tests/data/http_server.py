"""A real HTTP server of a folder, with ranges, whose answers a test can spoil."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Fault(Enum):
    """What becomes of an answer."""

    drop = "the connection ends in the middle of the body"
    stall = "nothing more comes after half of the body"
    truncate = "half of the range, and the headers say so"
    flip = "one bit is another"
    fail = "500"
    forbid = "403"
    no_ranges = "the whole file"


Spoil = Callable[[str, int], "Fault | None"]
"""The fault of the n-th GET (from 1) of the file of that name."""


class Server:
    """Serves `folder`. spoil: may be set at any time. requests: "METHOD NAME RANGE" of each so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spoil: Spoil = lambda _name, _count: None
        self.requests: list[str] = []
        self.ended = threading.Event()
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def log_message(self, *arguments: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = self.folder / handler.path.lstrip("/")
        span = handler.headers.get("Range", "")
        with self.lock:
            self.requests.append(f"{handler.command} {path.name} {span}".rstrip())
            self.counts[path.name] += body
            fault = self.spoil(path.name, self.counts[path.name])
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        try:
            self.send(handler, path, span, fault, body)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self.lock:
                self.at_once -= 1

    def send(self, handler: BaseHTTPRequestHandler, path: Path, span: str, fault: Fault | None, body: bool) -> None:
        whole = path.read_bytes() if path.is_file() else None
        if whole is None or fault in (Fault.fail, Fault.forbid):
            handler.send_response(404 if whole is None else 500 if fault is Fault.fail else 403)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data = bytearray(whole)
        if span and fault is not Fault.no_ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1]
        if fault is Fault.truncate:
            data = data[: len(data) // 2]
        if fault is Fault.flip:
            data[0] ^= 1
        handler.send_response(206 if span and fault is not Fault.no_ranges else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if not body:
            return
        cut = fault in (Fault.drop, Fault.stall)
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        if fault is Fault.stall:
            handler.wfile.flush()
            self.ended.wait()
        handler.close_connection = handler.close_connection or cut


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server that lives as long as the context."""
    server = Server(folder)
    thread = threading.Thread(target=server.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.httpd.shutdown()
        server.httpd.server_close()
        thread.join()
