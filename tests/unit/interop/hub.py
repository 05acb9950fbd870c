"""A server on this machine that answers as Hugging Face does, for one model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"


@contextmanager
def serve(folder: Path, asked: list[str]) -> Iterator[str]:
    """Serve the files of ``folder`` as the model NAME; ``asked`` receives the requested paths."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


def _handler(folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if path.startswith("/api/models/"):
                self._answer_api(path)
                return
            file = folder / path.rpartition("/")[2]
            if not path.startswith(f"/{NAME}/resolve/") or not file.is_file():
                self._fail("EntryNotFound")
                return
            body = file.read_bytes() if with_body else b""
            self._send(200, body, file.stat().st_size, _digest(file))

        def _answer_api(self, path: str) -> None:
            repository = path.removeprefix("/api/models/")
            if not repository.startswith(NAME):
                code = "GatedRepo" if repository.startswith("someone/gated") else "RepoNotFound"
                self._fail(code, 403 if code == "GatedRepo" else 404)
                return
            kind, _, revision = repository.removeprefix(f"{NAME}/").partition("/")
            if revision not in ("main", COMMIT):
                self._fail("RevisionNotFound")
                return
            files = [file for file in sorted(folder.iterdir()) if file.is_file()]
            about: Any = {
                "id": NAME,
                "sha": COMMIT,
                "siblings": [{"rfilename": file.name} for file in files],
            }
            if kind == "tree":
                about = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)}
                    for f in files
                ]
            body = json.dumps(about).encode()
            self._send(200, body, len(body))

        def _fail(self, code: str, status: int = 404) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, status: int, body: bytes, size: int, digest: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{digest}"')
            self.end_headers()
            self.wfile.write(body)

    return Handler
