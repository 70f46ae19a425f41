"""Statements for many rows at once, in the form that costs each database the least.

PostgreSQL is given the rows as one JSON document: one statement and one
parameter, worded the same however many rows there are, so that it is planned
once a connection. SQLite lies in this process, and runs the statement for each
row.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.types import TypeDecorator, TypeEngine

_ROWS = "given_rows"


class _Texts(TypeDecorator[Sequence[str]]):
    """A list of texts as one parameter: an array, and for SQLite JSON."""

    impl = sa.Text()
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        return sa.Text() if dialect.name == "sqlite" else postgresql.ARRAY(sa.Text())

    def process_bind_param(self, value: Sequence[str] | None, dialect: sa.Dialect) -> Any:
        return json.dumps(value) if dialect.name == "sqlite" else value


def among(dialect: str, column: sa.ColumnElement[str], name: str) -> sa.ColumnElement[bool]:
    """Whether a column's text is one of the parameter of that name, a list of any length."""
    texts = sa.bindparam(name, type_=_Texts())
    if dialect == "sqlite":
        return column.in_(sa.select(sa.func.json_each(texts).table_valued("value").c.value))
    return column == sa.func.any(texts)


def given(dialect: str, types: Mapping[str, TypeEngine[Any]]) -> Mapping[str, sa.ColumnElement[Any]]:
    """The values of the rows that the statement will be executed with, by name."""
    if dialect == "sqlite":
        return {name: sa.bindparam(name, type_=kind) for name, kind in types.items()}
    document = sa.cast(sa.bindparam(_ROWS, type_=sa.Text()), postgresql.JSON)
    rows = sa.func.json_to_recordset(document).table_valued(
        *(sa.column(name, kind) for name, kind in types.items())
    )
    return dict(rows.render_derived(name="given", with_types=True).c.items())


def insert(dialect: str, into: sa.Table, names: Sequence[str]) -> Any:
    """To insert the rows, which have these columns; ON CONFLICT and RETURNING may be added.

    On PostgreSQL no two of the rows may have the same key where a conflict updates.
    """
    if dialect == "sqlite":
        return sqlite.insert(into)
    rows = given(dialect, {name: into.c[name].type for name in names})
    return postgresql.insert(into).from_select(list(names), sa.select(*rows.values()))


def execute(
    connection: Connection, statement: sa.Executable, rows: list[dict[str, Any]], **parameters: Any
) -> sa.CursorResult[Any]:
    """Run such a statement for ``rows``, which are not empty. ``parameters`` are of all, on PostgreSQL."""
    if connection.dialect.name == "sqlite":
        return connection.execute(statement, rows)
    document = json.dumps(rows, default=_as_text, allow_nan=False)
    return connection.execute(statement, {_ROWS: document, **parameters})


def _as_text(value: object) -> str:
    """What JSON has no form for, as PostgreSQL reads it."""
    match value:
        case bytes():
            return f"\\x{value.hex()}"
        case datetime():
            return value.astimezone(UTC).isoformat()
        case date():
            return value.isoformat()
        case _:
            raise TypeError(f"no column has a {type(value).__name__}")
