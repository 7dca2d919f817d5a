"""What names say: whether a file holds embeddings of images, of texts, or metadata, and of which shard."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Role = Literal["image", "text", "metadata"]

LEAST_NUMBERED = 8
"""Fewer columns of numbers are no embedding."""

_WORDS: dict[Role, str] = {
    "image": r"images?|imgs?|visions?|visuals?|pictures?|photos?",
    "text": r"texts?|txts?|captions?|languages?|titles?|prompts?|sentences?",
    "metadata": r"metadata|meta",
}
_EMBEDDINGS = r"embs?|embeds?|embeddings?|feats?|features?|vecs?|vectors?"
_ROLES: dict[Role, re.Pattern[str]] = {
    role: re.compile(rf"(?:{words})(?:{_EMBEDDINGS})?") for role, words in _WORDS.items()
}
_FILLER = re.compile(_EMBEDDINGS)


@dataclasses.dataclass(frozen=True)
class Name:
    """A name of a file, a folder, or an array in a .npz, taken apart."""

    roles: frozenset[Role]
    """What it says that it holds: nothing, one role, or several, which say nothing clear."""
    rest: tuple[int | str, ...]
    """The other words and numbers: equal for the parts of one shard."""

    @classmethod
    def of(cls, name: str) -> "Name":
        """The name without its extension, as `img_emb_007` or `clipTextFeatures`."""
        apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
        words = [word.lower() for word in re.findall(r"\d+|[^\W\d_]+", apart)]
        roles: set[Role] = {role for role, pattern in _ROLES.items() if any(map(pattern.fullmatch, words))}

        known = [*_ROLES.values(), _FILLER]
        rest = [word for word in words if not any(pattern.fullmatch(word) for pattern in known)]
        return cls(
            roles=frozenset[Role](roles),
            rest=tuple(int(word) if word.isdecimal() else word for word in rest),
        )

    @property
    def role(self) -> Role | None:
        """The role, where the name is clear."""
        return next(iter(self.roles)) if len(self.roles) == 1 else None

    @property
    def pattern(self) -> tuple[int | str, ...]:
        """The words alone: equal for the shards of one series."""
        return tuple(0 if isinstance(part, int) else part for part in self.rest)

    @property
    def numbered(self) -> bool:
        return any(isinstance(part, int) for part in self.rest)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Names that differ in the number at their end alone, as those of the dimensions of a vector."""

    names: tuple[str, ...]
    """In the order of the numbers."""
    is_whole: bool
    """Whether each number from 0 or 1 on is there, once."""

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]}"


def numbered(names: Sequence[str]) -> list[Numbered]:
    """Groups of at least `LEAST_NUMBERED` names that differ in their number alone."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)([0-9]{1,9})", name, re.DOTALL)
        if match and not re.fullmatch(r"[-+]?[0-9][-+.0-9eE]*", match[1]):  # a number stands where a file has no names
            groups.setdefault(match[1], []).append((int(match[2]), name))

    found = list[Numbered]()
    for group in groups.values():
        if len(group) >= LEAST_NUMBERED:
            numbers, ordered = zip(*sorted(group), strict=True)
            first = numbers[0]
            found.append(Numbered(ordered, first in (0, 1) and list(numbers) == list(range(first, first + len(group)))))
    return found


def in_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """The order people count in: part2 before part10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.stem)], path.name


def listed(paths: list[Path], below: Path) -> str:
    """Names of files for a message: all of a few, else the first, the last and how many."""
    names = [str(path.relative_to(below)) if below in path.parents else path.name for path in paths]
    if len(names) > 4:
        return f"{names[0]} ... {names[-1]} ({len(names):,} files)"
    return ", ".join(names)
