"""Every answer that is not the one that was asked for: ``application/problem+json`` (RFC 9457)."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

MEDIA_TYPE: Final = "application/problem+json"

BAD_REQUEST: Final = 400
UNAUTHORIZED: Final = 401
FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
CONFLICT: Final = 409
INTERNAL: Final = 500
UNAVAILABLE: Final = 503


class Json(JSONResponse):
    """JSON in ASCII. Text of strangers may reach a terminal, and may not even be valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def body(status: int, detail: str) -> dict[str, Any]:
    """What a problem says. Its type is ``about:blank``, so its title is the status's phrase."""
    return {"status": status, "title": HTTPStatus(status).phrase, "detail": detail}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Json:
    needed = {"www-authenticate": "Bearer"} if status == UNAUTHORIZED else {}
    return Json(body(status, detail), status, {**needed, **(headers or {})}, media_type=MEDIA_TYPE)


async def of_routing(request: Request, error: Exception) -> Json:
    """For what no handler sees: an unknown path, a method that the path does not have."""
    if not isinstance(error, HTTPException):
        return await of_fault(request, error)
    details = {404: "there is nothing at this path", 405: f"{request.method} is not possible at this path"}
    return problem(error.status_code, details.get(error.status_code, error.detail), error.headers)


async def of_fault(_: Request, __: Exception) -> Json:
    """For a fault of the program. The server logs it. Its text may name what the caller must not know."""
    return problem(INTERNAL, "the archiver failed to answer; its log has the cause")
