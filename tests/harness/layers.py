"""The diagram of the layers in docs/concepts.md, generated from the import contracts in pyproject.toml.

Owns the block between the two ``layers`` comments of that page. A test compares it with the contracts;
``python -m tests.harness.layers`` writes it.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[2]
PAGE: Final = REPOSITORY / "docs" / "concepts.md"
BEGIN: Final = "<!-- layers: made by python -m tests.harness.layers -->"
END: Final = "<!-- layers ends -->"
_SPACING: Final = '%%{init: {"flowchart": {"nodeSpacing": 24, "rankSpacing": 18}}}%%'


def diagram() -> str:
    """The Mermaid block: one group for each contract of layers, one node for each layer."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    contracts = [
        contract for contract in project["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    ]
    lines = ["```mermaid", _SPACING, "flowchart TB"]
    for number, contract in enumerate(contracts):
        lines += _group(f"g{number}", contract)
    return "\n".join([*lines, "```"])


def _group(group: str, contract: Mapping[str, Any]) -> list[str]:
    layers: Sequence[str] = contract["layers"]
    [*containers] = contract.get("containers", ["archiver"])
    nodes = [f"{group}_{index}" for index in range(len(layers))]
    return [
        f'    subgraph {group}["{", ".join(containers)}"]',
        "        direction TB",
        *(f'        {node}["{_label(layer)}"]' for node, layer in zip(nodes, layers, strict=True)),
        f"        {' --> '.join(nodes)}",
        "    end",
    ]


def _label(layer: str) -> str:
    """The modules of a layer, without their package. ``|`` separates independent ones, ``:`` others."""
    names = re.split(r"\s*[|:]\s*", layer)
    return ", ".join(name.removeprefix("archiver.").strip("()") for name in names)


def written(page: str) -> str:
    """The page with the diagram as the contracts have it now."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no place for the layers: {BEGIN}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{diagram()}\n\n{END}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
