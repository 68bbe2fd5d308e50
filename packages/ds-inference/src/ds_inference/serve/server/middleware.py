"""What every HTTP request passes: its id, the key, the access log, and a count of the response.

A line of the access log has method, path, status, milliseconds and the id; never a query or a body. The id is the
client's `X-Request-Id` when it is short and plain, else a new one; the response carries it.
"""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_comm.log import get_logger
from ds_inference.serve.server.answers import error_object
from ds_inference.serve.server.metrics import ServerMetrics

__all__ = ["Gate"]

_log = get_logger("ds_inference.serve.access")
_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OTHER = "other"


class Gate:
    """ASGI middleware, outside of everything else."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], metrics: ServerMetrics, paths: Sequence[str]) -> None:
        self.app = app
        self._keys = [key.encode() for key in api_keys]
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
        started, status = time.monotonic(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        path = scope["path"]
        try:
            if path.startswith("/v1/") and not self._admitted(headers.get("authorization", "")):
                text = "no valid API key was given; send it as `Authorization: Bearer KEY`"
                refusal = JSONResponse(
                    error_object(text, "invalid_request_error", "invalid_api_key"), 401, {"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, watched)
            else:
                await self.app(scope, receive, watched)
        finally:
            self._metrics.responses.labels(path if path in self._paths else _OTHER, str(status)).inc()
            milliseconds = 1000 * (time.monotonic() - started)
            _log.info("%s %r %s %.0f ms %s", scope["method"], path, status, milliseconds, request_id)

    def _admitted(self, authorization: str) -> bool:
        if not self._keys:
            return True
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        # Every key is compared, in constant time each: how long it takes says nothing.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)
