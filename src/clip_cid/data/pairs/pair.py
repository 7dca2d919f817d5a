"""One image-text pair, or the reason why a sample cannot be used."""

import re
from dataclasses import dataclass


class BadSample(Exception):
    """One sample cannot be used; it is counted and listed, and keeps its row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def reason_kind(reason: str) -> str:
    """A reason without the parts that only one sample has (names, numbers, the cause in brackets), to be counted."""
    return re.sub(r"'[^']*'|\d[\d,.]*", "...", reason.partition(" (")[0])


@dataclass(frozen=True)
class Pair:
    """An image, still encoded, and its captions."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    """At least one; none is empty or has white space around it."""
    fields: dict[str, str]
    """`pairs.keep_fields` as text, empty if the sample has none."""
