"""A server of files in folders that stand for buckets, as object storage answers those who read it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Storage(ThreadingHTTPServer):
    """The server; a bucket named ``locked`` denies access, one named ``mute`` never answers."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Storage

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.asked.append((self.command, path))
        bucket = path.partition("/")[0]
        if bucket == "mute":
            self.server.closing.wait()
            self.close_connection = True
        elif bucket == "locked":
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif not (self.server.folder / bucket).is_dir():
            self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        elif not (self.server.folder / path).is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._file((self.server.folder / path).read_bytes())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def _file(self, data: bytes) -> None:
        unit, _, span = self.headers.get("Range", "").partition("=")
        if not unit:
            self._answer(200, data)
            return
        first, _, last = span.partition("-")
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        self._answer(206, data[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        standard = {"Content-Length": str(len(data)), "Last-Modified": self.date_time_string(0), "ETag": '"1"'}
        for name, value in (standard | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Storage]:
    """Serve the folders of a folder as buckets."""
    server = Storage(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
