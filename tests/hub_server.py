"""A small Hub on this machine: what huggingface_hub and datasets ask for when they download a repository."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(repositories: dict[str, Path], refusal: tuple[int, str] = (404, "EntryNotFound")) -> Iterator[str]:
    """The address of a Hub with these repositories ("models/OWNER/NAME" or "datasets/OWNER/NAME": the folder); `refusal` is
    the status and the error code of everything else."""

    class Handler(_Handler):
        folders = repositories
        refused = refusal

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folders: dict[str, Path] = {}
    refused = (404, "")

    def do_GET(self):
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", kind, owner, name, *what] if files := self.files(kind, owner, name):
                entries = [{"type": "file", "path": p, "size": len(b), "oid": _hash(b)} for p, b in files.items()]
                about = {"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "siblings": []}
                self.answer(json.dumps(entries if what[:1] == ["tree"] else about).encode())
            case ["datasets", owner, name, "resolve", _, *path]:
                self.answer(self.files("datasets", owner, name).get("/".join(path)))
            case [owner, name, "resolve", _, *path]:
                self.answer(self.files("models", owner, name).get("/".join(path)))
            case _:
                self.answer(None)

    do_HEAD = do_GET

    def files(self, kind: str, owner: str, name: str) -> dict[str, bytes]:
        folder = self.folders.get(f"{kind}/{owner}/{name}")
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder else []
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    def answer(self, content: bytes | None) -> None:
        self.send_response(self.refused[0] if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            self.send_header("X-Error-Code", self.refused[1])
        else:
            self.send_header("ETag", f'"{_hash(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if content is not None and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
