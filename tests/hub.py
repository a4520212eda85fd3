"""A model hub on this machine: speaks what huggingface_hub asks of one, serves folders, notes every request.

`Hub` is the server; `Loader` is a Python process that has it as its hub and loads pipelines from it, since
huggingface_hub reads its settings once, at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Request:
    """One request for a file: ``start`` is the byte it asked to begin at."""

    method: str
    repo: str
    file: str
    start: int


@dataclass
class Repo:
    """A repository: the folder behind each of its revisions, the first being its default branch."""

    revisions: dict[str, Path]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The 40-digit commit that a branch, tag or commit stands for."""
        commits = {
            name: hashlib.sha1(f"{name} {folder}".encode()).hexdigest() for name, folder in self.revisions.items()
        }
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, commit: str) -> Path:
        return next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)

    def files(self, commit: str) -> dict[str, Path]:
        folder = self.folder(commit)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Hub:
    """A running hub on 127.0.0.1.

    Attributes:
        repos: by id, such as ``owner/name``.
        requests: the files asked for, in order.
        cut: for a file's path, how many more downloads break off once half of the file is sent.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._listen(port=0)

    def _listen(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Nobody listens on the hub's port meanwhile."""
        port = self._server.server_port
        self.close()
        try:
            yield
        finally:
            self._listen(port)

    def add(self, repo: str, folder: Path, *, gated: bool = False, **other_revisions: Path) -> str:
        """Serves a folder as a repository; returns its id."""
        self.repos[repo] = Repo({"main": folder, **other_revisions}, gated)
        return repo

    def downloaded(self, repo: str) -> set[str]:
        """The files of a repository that were downloaded, at least in part."""
        return {request.file for request in self.requests if request.repo == repo and request.method == "GET"}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision, file = found[1], found[2] or "revision", found[3] or "main", ""
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            name, what, revision, file = found[1], "resolve", found[2], found[3]
        else:
            return self._refuse(404, "EntryNotFound")
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        commit = repo.commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if what == "resolve":
            return self._file(name, repo, commit, file)
        files = repo.files(commit)
        if what == "tree":
            return self._json([self._tree_entry(path, files[path]) for path in files])
        self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    @staticmethod
    def _tree_entry(name: str, path: Path) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}

    def _file(self, name: str, repo: Repo, commit: str, file: str) -> None:
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.hub.requests.append(Request(self.command, name, file, start))
        if repo.gated:
            return self._refuse(403, "GatedRepo")
        path = repo.files(commit).get(file)
        if path is None:
            return self._refuse(404, "EntryNotFound", commit)
        content = path.read_bytes()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", commit)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        end = len(content)
        if self.command == "GET" and self.hub.cut.get(file, 0) > 0:
            self.hub.cut[file] -= 1
            end //= 2
        self._finish(content[start:end], length=len(content) - start)

    def _json(self, answer: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._finish(json.dumps(answer).encode())

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self._finish(b"")

    def _finish(self, body: bytes, length: int | None = None) -> None:
        self.send_header("Content-Length", str(len(body) if length is None else length))
        # One request a connection: none is left open when the hub becomes unreachable.
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Loader:
    """A Python process whose model hub is a `Hub` and whose cache is a folder of its own."""

    _PROGRAM = """
import json, sys, torch
from diffusion_features.loading import LoadError, load_pipeline, model_revision
for line in sys.stdin:
    try:
        pipe = load_pipeline(**json.loads(line))
    except LoadError as error:
        reply = {"error": str(error), "cause": type(error.__cause__).__name__}
    else:
        reply = {
            "class": type(pipe).__name__,
            "revision": model_revision(pipe),
            "parts": [name for name, part in pipe.components.items() if part is not None],
            "conv_in": pipe.unet.conv_in.weight.double().sum().item(),
        }
    print("reply", json.dumps(reply), flush=True)
"""

    def __init__(self, hub: Hub, cache: Path, **environment: str) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        written = (cache / "messages").open("w")
        self._messages = (cache / "messages").open()  # a place in the file of its own
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        kept = {name: value for name, value in kept.items() if not name.startswith("HF_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            env=kept
            | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
            | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
            | environment,
        )
        written.close()

    def load(self, model: str | Path, **options: Any) -> dict[str, Any]:
        """Calls ``load_pipeline`` in the process; returns what came of it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"model": str(model), **options}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("reply "):
                return json.loads(line.removeprefix("reply "))
        raise AssertionError(f"the loading process ended: {self.messages()}")

    def messages(self) -> str:
        """What the process wrote to its error output since the last call."""
        return self._messages.read()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._messages.close()
