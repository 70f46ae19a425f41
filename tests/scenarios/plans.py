"""How PostgreSQL goes about the statements of a function: each is explained as it is sent, then run.

A statement that a connection sends often is prepared. From some time on it may
be planned without a look at its values; so it is explained that way, too, where
the server would choose so.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.engine import Connection

_EXPLAINED = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", re.IGNORECASE)
_BY_INDEX = {"Index Scan", "Index Only Scan", "Bitmap Index Scan"}
_PLANNING_COST = 2.5
"""Of one relation, in the planner's units: a thousand times cpu_operator_cost."""

_PART = re.compile(r"(capture|sighting)_(\d\d)")


@dataclass
class Plans:
    """What the statements of one function did, or would do."""

    whole: set[str] = field(default_factory=set)
    """Tables of which all rows are looked at, by a scan or by an index without a condition."""

    parts: dict[str, set[str]] = field(default_factory=dict)
    """Parts of partitioned tables, of that statement that looks into most of them."""

    indexes: set[str] = field(default_factory=set)
    """That are gone by when statements are planned for their values."""

    indexes_when_prepared: set[str] = field(default_factory=set)
    """The same, once statements have been sent often."""

    conditions_when_prepared: set[str] = field(default_factory=set)
    """By which indexes of partitioned tables are gone into then."""

    statements: int = 0


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


@contextmanager
def explained(connection: Connection) -> Iterator[Plans]:
    """Explains what is sent over this connection within the block."""
    plans = Plans()
    parents, partial = _indexes(connection)

    def before(_: object, cursor: Any, statement: str, parameters: Any, __: object, many: bool) -> None:
        if _EXPLAINED.match(statement):
            plans.statements += 1
            first, often = _plans(cursor, statement, parameters[0] if many else parameters)
            plans.indexes |= _add(plans, first, parents, partial)
            plans.indexes_when_prepared |= _add(plans, often, parents, partial)
            plans.conditions_when_prepared |= {
                node.get("Index Cond", "") for node in nodes(often) if _PART.match(node.get("Index Name", ""))
            }

    sa.event.listen(connection, "before_cursor_execute", before)
    try:
        yield plans
    finally:
        sa.event.remove(connection, "before_cursor_execute", before)


def _add(plans: Plans, plan: dict[str, Any], parents: dict[str, str], partial: set[str]) -> set[str]:
    indexes = set()
    parts: dict[str, set[str]] = {}
    for node in nodes(plan):
        relation, index = node.get("Relation Name"), node.get("Index Name")
        if relation is not None and node["Node Type"] != "ModifyTable":
            part = _PART.fullmatch(relation)
            table = part[1] if part else relation
            if part:
                parts.setdefault(table, set()).add(part[2])
            by_index = node["Node Type"] in _BY_INDEX | {"Bitmap Heap Scan"}
            all_of_it = index is not None and "Index Cond" not in node and parents[index] not in partial
            if not by_index or all_of_it:
                plans.whole.add(table)
        if index is not None:
            indexes.add(parents[index])
    for table, touched in parts.items():
        plans.parts[table] = max(plans.parts.get(table, set()), touched, key=len)
    return indexes


def _indexes(connection: Connection) -> tuple[dict[str, str], set[str]]:
    """The index of the whole table behind each index, and those that hold some rows only."""
    rows = connection.exec_driver_sql(
        "SELECT c.relname, coalesce(p.relname, c.relname), i.indpred IS NOT NULL FROM pg_index i "
        "JOIN pg_class c ON c.oid = i.indexrelid LEFT JOIN pg_inherits h ON h.inhrelid = c.oid "
        "LEFT JOIN pg_class p ON p.oid = h.inhparent"
    ).all()
    return {name: parent for name, parent, _ in rows}, {parent for _, parent, some in rows if some}


def _plans(cursor: Any, statement: str, parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan for these values, and the one that the server uses from some time on."""
    streamed = isinstance(cursor, psycopg.ServerCursor)
    with psycopg.ClientCursor(cursor.connection) as asking:
        # What is streamed is planned to give its first rows soon, and is never prepared.
        declared = f"DECLARE streamed NO SCROLL CURSOR FOR {statement}" if streamed else statement
        first = _plan(asking, f"EXPLAIN (FORMAT JSON) {declared}", parameters)
        if streamed or not parameters:
            return first, first
        names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
        numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", statement)
        values = ", ".join(sql.Literal(parameters[name]).as_string(cursor.connection) for name in names)
        asking.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        asking.execute(f"PREPARE often AS {numbered.replace('%%', '%')}")
        try:
            often = _plan(asking, f"EXPLAIN (FORMAT JSON) EXECUTE often ({values})")
        finally:
            asking.execute("DEALLOCATE often")
            asking.execute("SET LOCAL plan_cache_mode TO DEFAULT")
        # As the server does: what it saves is the planning (choose_custom_plan in its plancache.c).
        relations = sum("Relation Name" in node for node in nodes(first))
        saved = _PLANNING_COST * (relations + 1)
        return first, often if often["Total Cost"] < first["Total Cost"] + saved else first


def _plan(asking: Any, statement: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    found = asking.execute(statement, parameters).fetchone()[0]
    plan: dict[str, Any] = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
    return plan
