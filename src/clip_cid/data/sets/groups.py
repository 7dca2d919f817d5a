"""Lists of evaluation sets that others average over (`groups.toml`), and which of them can be measured here."""

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict

from clip_cid.data.sets.known_sets import KnownSet, find_known_set, known_sets, without_prefixes

DATACOMP = "datacomp"


class Member(BaseModel):
    """One set of a list; the head of `groups.toml` says what its fields mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    task: str
    metric: str
    read: Literal["known", "own", "retrieval", "missing"]
    known: str | None = None
    lacks: str | None = None

    @property
    def name(self) -> str:
        """What to call it in `evaluate.sets`."""
        return self.known or self.task.rpartition("/")[2]

    def is_named(self, name: str) -> bool:
        """Whether a set of a recipe is this one."""
        if self.known is not None:
            known = find_known_set(name)
            return known is not None and known.key == self.known
        own = {without_prefixes(text) for text in (self.task, self.name, self.title)}
        return self.read != "missing" and without_prefixes(name) in own

    @property
    def how(self) -> str:
        """How it is measured here, in words."""
        return {
            "known": "a known set",
            "own": "CLIP_benchmark's folder, as a set of your own",
            "retrieval": "its pairs, under evaluate.retrieval",
            "missing": f"not measured: {self.lacks}",
        }[self.read]


@cache
def members(group: str) -> tuple[Member, ...]:
    """The sets of a list, in its order."""
    text = resources.files("clip_cid.data.sets").joinpath("groups.toml").read_text(encoding="utf-8")
    return tuple(Member(**row) for row in tomllib.loads(text)[group])


def table_of(group: Literal["clip", "datacomp"]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the sets of a list."""
    if group == DATACOMP:
        lines = [[one.title, "" if one.read == "missing" else one.name, one.metric, one.how] for one in members(group)]
        return ["set", "name in a recipe", "metric", "how"], lines
    return ["set", "name in a recipe", "metric", "where"], [_line(known) for known in known_sets().values()]


def _line(known: KnownSet) -> list[str]:
    return [known.title, known.key, known.metric, known.where]
