"""Text from strangers, made safe for a terminal and a log.

Greetings, refusals, ids and subjects come from mail servers and stores. Raw, they
could move the cursor, retitle the window, hide a line, or show its words in another
order. JSON needs none of this: the encoder escapes everything but ASCII.
"""

import unicodedata
from typing import Final

_LAYOUT: Final = frozenset("\n\t")


def printable(text: str) -> str:
    r"""The text with escapes such as ``\x1b`` for all that is not visible by itself.

    That is every control character but the line end and the tab, every format
    character such as a bidirectional override, line separators, and half of a
    surrogate pair. Letters of all scripts and all kinds of spaces stay.
    """
    if text.isprintable():
        return text
    return "".join(each if _is_harmless(each) else _escaped(each) for each in text)


def _is_harmless(each: str) -> bool:
    return each.isprintable() or each in _LAYOUT or unicodedata.category(each) == "Zs"


def _escaped(each: str) -> str:
    return each.encode("unicode_escape").decode("ascii")
