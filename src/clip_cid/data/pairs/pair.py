"""One image-text pair, or the reason why a sample cannot be used."""

import re
from dataclasses import dataclass

DUPLICATE = "duplicate key"
"""How the reason of a sample with the key of an earlier one begins."""
NO_CAPTION = "no caption"
"""How the problem of a sample begins that lacks nothing but a caption."""


class BadSample(Exception):
    """One sample cannot be used; it is counted and listed, and keeps its row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def reason_kind(reason: str) -> str:
    """A reason without the parts that only one sample has (names, numbers, the cause in brackets), to be counted."""
    return re.sub(r"'[^']*'|\d[\d,.]*", "...", reason.partition(" (")[0])


def remedy(reason: str) -> str:
    """What can be done about samples that cannot be used for this reason."""
    if reason.startswith(DUPLICATE):
        return (
            "set pairs.key_prefix: shard if keys repeat from one shard to the next, pairs.repeated_rows: merge if a"
            " table has a row for each caption, or pairs.key_column to a column without repetition"
        )
    if reason.startswith(NO_CAPTION):
        field = "name the json field with captions in pairs.captions_field, or " if "json field" in reason else ""
        return f"{field}set pairs.captions: optional if images alone are enough"
    return "repair the pairs"


@dataclass(frozen=True)
class Pair:
    """An image, still encoded, and its captions."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    """None is empty or has white space around it. At least one, unless `pairs.captions` is optional."""
    fields: dict[str, str]
    """`pairs.keep_fields` as text, empty if the sample has none."""
    remark: str = ""
    """How the sample was read, where it could be meant otherwise; empty for most."""
