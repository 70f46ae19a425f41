"""From a request to an answer: access, parameters, and problems (RFC 9457), the same for every route."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from archiver.db import Database
from archiver.errors import ArchiverError
from archiver.web.auth import Access, Refused
from archiver.web.problems import BAD_REQUEST, UNAVAILABLE, Json, problem

LONGEST_NUMBER = 20
"""Digits: enough for 64 bits. Python refuses to read a number of some thousand digits."""


class Problem(Exception):
    """An answer that is not the one that was asked for."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Api:
    """What handlers need. They are plain functions, which Starlette runs in threads: the database blocks."""

    database: Database
    access: Access

    def handler(
        self,
        answer: Callable[[Request], dict[str, Any]],
        *,
        parameters: Collection[str] = (),
        status: int = 200,
        changes: bool = False,
    ) -> Callable[[Request], Response]:
        """A handler that checks the access, and makes JSON of what ``answer`` returns or raises.

        ``parameters`` are the names that the query may have, each once.
        """

        def handle(request: Request) -> Response:
            try:
                self.access.check(request, changes=changes)
                _check_names(request, parameters)
                return Json(answer(request), status)
            except Refused as refused:
                return problem(refused.status, refused.reason)
            except Problem as found:
                return problem(found.status, found.detail)
            except ArchiverError as error:
                return problem(UNAVAILABLE, str(error))

        return handle


def number(request: Request, name: str, default: int, most: int) -> int:
    """A parameter of the query. Raises Problem if it is not a whole number from 0 to ``most``."""
    text = request.query_params.get(name, str(default))
    is_number = text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER
    if not (is_number and int(text) <= most):
        raise Problem(BAD_REQUEST, f"{name} is a whole number from 0 to {most}")
    return int(text)


def _check_names(request: Request, parameters: Collection[str]) -> None:
    """Raises Problem for a parameter that would be ignored: most likely it is misspelled."""
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in parameters:
            known = f"; there are {', '.join(parameters)}" if parameters else ""
            raise Problem(BAD_REQUEST, f"there is no parameter {name!r}{known}")
        if given.count(name) > 1:
            raise Problem(BAD_REQUEST, f"{name} is given more than once")
