"""What reaches the server at all: a few routes, small bodies, and no file by its address."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX = "/gradio_api/"
ROUTES = ("queue/join", "call/", "run/predict", "cancel", "reset")
"""Routes of Gradio that a page and ``gradio_client`` post to, besides ``upload``."""
FORM = 64 * 2**10
"""Bytes that the form around an uploaded file may take."""


class Guard:
    """ASGI middleware that answers unwanted requests itself.

    Gradio would fetch a file that a request names by its URL, and decode pictures written into the request; the page
    needs neither, since browsers and ``gradio_client`` upload files first.
    """

    def __init__(self, app: ASGIApp, body: int, upload: int) -> None:
        """
        Args:
            body: bytes of a request that is no upload.
            upload: bytes of an uploaded file.
        """
        self._app, self._body, self._upload = app, body, upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        route = scope["path"].rpartition(PREFIX)[2]
        if route == "upload":
            await self._counted(scope, receive, send)
        elif not route.startswith(ROUTES):
            await _refuse(404, "This page has no such address.")(scope, receive, send)
        else:
            await self._read(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on, unless it says that it is too long; Gradio counts what comes."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._upload + FORM:
            await _refuse(413, f"A file may have at most {self._upload // 2**20} MB.")(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the visitor has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._body:
                await _refuse(413, "The request is too long.")(scope, receive, send)
                return
        try:
            elsewhere = _names_file_elsewhere(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            await _refuse(400, "The request is no JSON.")(scope, receive, send)
            return
        if elsewhere:
            await _refuse(400, "Upload files; this page fetches none.")(scope, receive, send)
            return
        await self._app(scope, _again(body, receive), send)


def _names_file_elsewhere(value: Any) -> bool:
    """Whether a request has a file object that is to be fetched, or whose content is written into its address."""
    if isinstance(value, list):
        return any(map(_names_file_elsewhere, value))
    if not isinstance(value, dict):
        return False
    path, url = value.get("path"), value.get("url")
    fetched = isinstance(path, str) and ":" in path.partition("/")[0]
    written = "path" in value and isinstance(url, str) and url.strip().lower().startswith("data:")
    return fetched or written or any(map(_names_file_elsewhere, value.values()))


def _again(body: bytes, receive: Receive) -> Receive:
    """A stream that gives a body that was read already, and then what follows it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)
