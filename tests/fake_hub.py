"""A hub of models on this machine: the part of the Hugging Face hub's API that downloads use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FakeHub:
    """Repositories from folders; each revision of one is a folder.

    Args:
        repositories: id -> revision -> folder. "main" is the default branch.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        self.url = ""

    def folder(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a revision, which may be the commit itself."""
        for name, folder in self.repositories.get(repository, {}).items():
            commit = hashlib.sha1(f"{repository}@{name}".encode()).hexdigest()
            if revision in (name, commit):
                return commit, folder
        return None

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                hub.requests.append(f"{self.command} {path}")
                status, headers, body = hub.response(path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def response(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for `/api/models/ID[/revision/REVISION]` or `/ID/resolve/REVISION/FILE`."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repository, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if rest[:1] == ["revision"] else "main"
            found = self.folder(repository, revision)
            if found is None:
                code = "RevisionNotFound" if repository in self.repositories else "RepoNotFound"
                return 404, {"X-Error-Code": code}, b"{}"
            if rest and rest[0] != "revision":
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            commit, folder = found
            names = sorted(file.name for file in folder.iterdir())
            siblings = [{"rfilename": name} for name in names]
            info = {"id": repository, "modelId": repository, "sha": commit, "tags": [], "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if len(parts) == 5 and parts[2] == "resolve":
            found = self.folder("/".join(parts[:2]), parts[3])
            if found is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            commit, folder = found
            file = folder / parts[4]
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            content = file.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
