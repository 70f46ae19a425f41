"""Statements for many rows at once, in the form that costs each database the least.

PostgreSQL gets each column as one array. The statement is the same for any number
of rows, so it is planned once per connection. SQLite is part of this process, and
its driver runs the statement for each row. The driver's values are made here,
column by column: if SQLAlchemy looked at each value of each row, that would cost
more than SQLite needs for the row.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import repeat
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.types import TypeDecorator, TypeEngine

FETCH_ROWS = 1_000
"""Rows that a streamed read keeps in memory at once."""

OCTETS = "octets_of_hex"
"""A function that we add to connections to SQLite. Not every version in use has its own, unhex()."""

Types = Mapping[str, TypeEngine[Any]]
Values = Mapping[str, sa.ColumnElement[Any]]


class ForRows:
    """A statement that runs for many rows, and is built once for each kind of database.

    ``types`` has the type of each value in a row, by name. In an UPDATE these
    names must differ from those of columns. ``worded`` builds the statement from
    the dialect's name and these values; parameters that it adds are the same for
    all rows. On PostgreSQL, no two rows may insert or change the same row.
    """

    def __init__(self, types: Types, worded: Callable[[str, Values], UpdateBase]) -> None:
        self._types = types
        self._worded = worded
        self._statements: dict[str, UpdateBase] = {}
        self._of_driver: _OfDriver | None = None

    def run(
        self, connection: Connection, rows: Sequence[Mapping[str, Any]], **of_all: Any
    ) -> sa.CursorResult[Any]:
        """Run it for these rows, of which there is at least one. The result covers all of them."""
        dialect = connection.dialect
        statement = self._statements.get(dialect.name)
        if statement is None:
            statement = self._worded(dialect.name, _given(dialect.name, self._types))
            self._statements[dialect.name] = statement
        if dialect.name != "sqlite":
            arrays = {name: _array(row[name] for row in rows) for name in self._types}
            return connection.execute(statement, arrays | of_all)
        if statement.exported_columns:
            # The driver returns nothing for many rows, so SQLAlchemy makes one statement of them.
            return connection.execute(statement, [{**row, **of_all} for row in rows])
        if self._of_driver is None:
            self._of_driver = _OfDriver(statement, self._types, dialect)
        return connection.exec_driver_sql(self._of_driver.text, self._of_driver.parameters(rows, of_all))


def insert(
    into: sa.Table, names: Sequence[str], then: Callable[[Any], Any] = lambda insert: insert
) -> ForRows:
    """A statement that inserts rows with these columns. ``then`` may add ON CONFLICT and RETURNING."""

    def worded(dialect: str, values: Values) -> Any:
        if dialect == "sqlite":
            return then(sqlite.insert(into))
        return then(postgresql.insert(into).from_select(list(names), sa.select(*values.values())))

    return ForRows({name: into.c[name].type for name in names}, worded)


def one_of_all(dialect: str, column: sa.ColumnElement[Any], name: str) -> sa.ColumnElement[bool]:
    """A condition that a column has one of the rows' values. Add it to the one for this row's value.

    Without it, PostgreSQL may read all rows that the other conditions leave, and
    compare them. With it, PostgreSQL looks for the few values in the index.
    """
    if dialect == "sqlite":
        return sa.true()
    return column == sa.func.any(_array_of(sa.bindparam(name, type_=_AS_CAST), column.type))


def among(dialect: str, column: sa.ColumnElement[Any], name: str) -> sa.ColumnElement[bool]:
    """A condition that a column's text or bytes are in the parameter of this name, a list of any length."""
    values = _listed(dialect, column, name)
    return column.in_(sa.select(values)) if dialect == "sqlite" else column == sa.func.any(values)


def look_up(dialect: str, query: sa.Select[Any], column: sa.ColumnElement[Any], name: str) -> sa.Select[Any]:
    """The query's rows in which this column is in such a list.

    If the list has a value twice, its rows may come twice. Each value is looked
    for by itself, in an index of the query's other conditions and this column.
    """
    if dialect == "sqlite":
        return query.where(among(dialect, column, name))
    wanted = sa.func.unnest(_listed(dialect, column, name)).table_valued(sa.column("value", column.type))
    wanted = wanted.render_derived(name="wanted")
    # While a table has no statistics, PostgreSQL would prefer to read all rows that meet the other
    # conditions, and compare them. OFFSET prevents that.
    found = query.where(column == wanted.c.value).offset(sa.literal_column("0")).lateral("found")
    return sa.select(*found.c).select_from(wanted.join(found, sa.true()))


def _listed(dialect: str, column: sa.ColumnElement[Any], name: str) -> sa.ColumnElement[Any]:
    given = sa.bindparam(name, type_=_List())
    if dialect != "sqlite":
        return _array_of(given, column.type)
    value: sa.ColumnElement[Any] = sa.func.json_each(given).table_valued("value").c.value
    return sa.Function(OCTETS, value) if isinstance(column.type, sa.LargeBinary) else value


_AS_CAST = sa.types.NullType()
"""For values that PostgreSQL reads as the type of the cast. It would parse a text again for each row."""


class _List(TypeDecorator[Sequence[str] | Sequence[bytes]]):
    """A list as one parameter: an array, or for SQLite JSON, with bytes in hexadecimal digits."""

    impl = _AS_CAST
    cache_ok = True

    def process_bind_param(self, value: Sequence[str] | Sequence[bytes] | None, dialect: sa.Dialect) -> str:
        values = value or ()
        if dialect.name != "sqlite":
            return _array(values)
        return json.dumps([each.hex() if isinstance(each, bytes) else each for each in values])


def _given(dialect: str, types: Types) -> Values:
    if dialect == "sqlite":
        return {name: sa.bindparam(name, type_=kind) for name, kind in types.items()}
    arrays = (_array_of(sa.bindparam(name, type_=_AS_CAST), kind) for name, kind in types.items())
    rows = sa.func.unnest(*arrays).table_valued(*(sa.column(name, kind) for name, kind in types.items()))
    return dict(rows.render_derived(name="given").c.items())


def _array_of(text: sa.ColumnElement[Any], kind: TypeEngine[Any]) -> sa.ColumnElement[Any]:
    # A cast to a type with a length would silently cut longer values.
    return sa.cast(text, postgresql.ARRAY(sa.Text() if isinstance(kind, sa.String) else kind))


def _array(values: Iterable[Any]) -> str:
    """An array as PostgreSQL writes it: https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO."""
    return "{" + ",".join([_WORDS[type(value)](value) for value in values]) + "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_WORDS: Mapping[type, Callable[[Any], str]] = {
    type(None): lambda _: "NULL",
    bool: str,
    int: str,
    float: str,
    date: str,
    datetime: lambda value: f'"{value.astimezone(UTC)}"',
    bytes: lambda value: f'"\\\\x{value.hex()}"',
    str: _quoted,
}


class _OfDriver:
    """A statement in the form that SQLite's driver takes."""

    def __init__(self, statement: UpdateBase, types: Types, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=list(types))
        self.text = str(compiled)
        self._types = types
        self._fixed = compiled.params
        self._fields = [
            (name, _conversion(compiled.binds[name].type, dialect)) for name in compiled.positiontup or ()
        ]

    def parameters(
        self, rows: Sequence[Mapping[str, Any]], of_all: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        fixed = {**self._fixed, **of_all}
        columns: list[Iterable[Any]] = []
        for name, convert in self._fields:
            if name not in self._types:
                columns.append(repeat(convert(fixed[name]) if convert else fixed[name]))
            elif convert:
                columns.append([convert(row[name]) for row in rows])
            else:
                columns.append([row[name] for row in rows])
        return list(zip(*columns, strict=False))


def _conversion(kind: TypeEngine[Any], dialect: sa.Dialect) -> Callable[[Any], Any] | None:
    """What SQLAlchemy does to a value of this type. The driver takes bytes as they are."""
    return None if isinstance(kind, sa.LargeBinary) else kind.dialect_impl(dialect).bind_processor(dialect)
