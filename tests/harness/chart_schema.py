"""The account in the chart's schema, written from ``archiver.accounts.fields``.

``python -m tests.harness.chart_schema`` brings ``helm/archiver/values.schema.json``
up to date after a setting was added or changed. A test fails while it is not.
"""

import json
import re
from pathlib import Path
from typing import Final

from archiver.accounts import fields

SCHEMA: Final = Path(__file__).parents[2] / "helm" / "archiver" / "values.schema.json"

_ACCOUNT: Final = re.compile(r'^    "account": \{\n.*?^    \}', re.MULTILINE | re.DOTALL)


def rewritten(text: str) -> str:
    """The schema with its account as the fields are: a line for each."""
    schema = fields.schema()
    properties = [f"        {_line(name)}: {_line(value)}" for name, value in schema["properties"].items()]
    rest = [f"      {_line(key)}: {_line(value)}" for key, value in schema.items() if key != "properties"]
    middle = '      "properties": {\n' + ",\n".join(properties) + "\n      }"
    account = '    "account": {\n' + ",\n".join([*rest[:2], middle, *rest[2:]]) + "\n    }"
    return _ACCOUNT.sub(lambda _: account, text)


def _line(value: object) -> str:
    return json.dumps(value)


if __name__ == "__main__":
    SCHEMA.write_text(rewritten(SCHEMA.read_text()))
