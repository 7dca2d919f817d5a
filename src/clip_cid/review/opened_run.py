"""A finished balance opened for a person: who is where, what was kept, what is decided, at any threshold."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, UInt64

from clip_cid import os_errors
from clip_cid.addresses import without_secrets
from clip_cid.data.balance.against_file import read_dropped
from clip_cid.data.balance.decided_file import read_decided
from clip_cid.data.balance.decisions import Decision, Decisions, Image, Kind, hash_text, rows_named
from clip_cid.data.balance.forest_file import FOREST_FILE, HASHES_FILE, read_forest
from clip_cid.data.balance.kept_file import KEPT_FILE, SET_FILE
from clip_cid.data.balance.protected import protected_rows
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.inputs import path_here
from clip_cid.data.npy_files import read_array_of_stage
from clip_cid.errors import DataError, RunError
from clip_cid.method.balance.decided_sets import DecidedRows, cut_links
from clip_cid.method.balance.forest import Forest
from clip_cid.method.distances import Metric, threshold_for, threshold_on, to_squared
from clip_cid.recipe import Recipe
from clip_cid.review.decision_log import DecisionLog
from clip_cid.review.sets_at import Sets, SetsAt
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE, EMBED

DECISIONS_FILE = "decisions.jsonl"

_MOST_CHOSEN = 20_000  # rows of sets whose kept ones are chosen for a page
_KEPT_IN_MEMORY = 4  # thresholds


class Scales(NamedTuple):
    """One threshold on each scale, as `balance.threshold` takes it."""

    squared: float
    on: dict[str, float]


@dataclass(frozen=True, eq=False)
class Decided:
    """The decisions that hold now, and what they make of the forest."""

    decisions: Decisions
    rows: DecidedRows
    obeyed: DecidedRows
    """With the rows that settings keep (`balance.protect`) and remove (`balance.against`)."""
    gone: tuple[Image, ...]
    at: SetsAt
    named: Bool[np.ndarray, " rows"]
    """The rows that some decision names."""


class OpenedRun:
    """The balance of a run, and the file of decisions about it.

    Args:
        folder: The run.
        recipe: Its recipe.
        decisions: The file; by default that of the recipe, or `decisions.jsonl` in the run folder.

    Raises:
        RunError: No balance has finished here, or the embeddings were made again after it.
        DataError: A file is missing or damaged.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, decisions: Path | None = None) -> None:
        self.folder, self.recipe = folder, recipe
        balance = folder.stage(BALANCE)
        _check_same_embeddings(folder)
        if not BalanceTables.exist(balance):
            raise RunError(
                f"{balance}: the kept rows were made elsewhere (--kept), so there are no sets to review.",
                fix=f"Run `clip-cid balance {folder.path}` without --kept.",
            )

        self.store = EmbeddingStore.open(folder.stage(EMBED))
        self.forest = Forest(*read_forest(balance / FOREST_FILE))
        self.hashes: UInt64[np.ndarray, "rows 2"] = read_array_of_stage(balance / HASHES_FILE)
        self._kept, self._set_of = (read_array_of_stage(balance / name) for name in (KEPT_FILE, SET_FILE))
        self._tables = BalanceTables(balance)
        self.metric: Metric = next(name for name in get_args(Metric) if name == self._tables.metric)
        self.squared = min(threshold_on(self.metric, self._tables.threshold, "squared_euclidean"), self.forest.limit)
        self._dropped = read_dropped(balance).rows
        self._protected = self._rows_protected()
        self._decided_then = np.zeros(self.store.rows, dtype=bool)
        self._decided_then[np.concatenate([read_decided(balance), self._dropped, self._protected])] = True
        self.ok = int(self.store.ok.sum())

        self.log = DecisionLog(_file_of_decisions(folder, recipe, decisions))
        self._lock = threading.RLock()
        self._decided: Decided | None = None
        self._sets: dict[float, Sets] = {}

    def _rows_protected(self) -> Int[np.ndarray, " protected"]:
        settings, shards = self.recipe.balance, [(shard.name, shard.rows) for shard in self.store.info.shards]
        if not settings.protect:
            return np.zeros(0, dtype=np.int64)
        lists = [path_here(path, self.recipe.machine.cache_dir) for path in settings.protected_lists]
        return protected_rows(settings.protected_sources, lists, shards, self.store.keys.packed)

    def warm_up(self) -> None:
        """Read what the first page does without and the next ones need."""
        _ = self._all_sets, self._captions, self.sources
        import clip_cid.stages.balance  # noqa: F401

    # Thresholds

    def scales(self, squared: float) -> Scales:
        """A squared threshold on all scales; each of them gives the same sets on the command line."""
        return Scales(
            squared, {metric: threshold_for(squared, metric) if squared else 0.0 for metric in get_args(Metric)}
        )

    # Decisions

    @property
    def decided(self) -> Decided:
        """What holds now, also of lines that another process has added."""
        decisions = self.log.read()
        with self._lock:
            if self._decided is None or self._decided.decisions is not decisions:
                self._decided = self._decide(decisions)
                self._sets.clear()
            return self._decided

    def decide(self, kind: Kind, rows: Sequence[int]) -> Decision:
        """Save a decision about rows; as `DecisionLog.decide`."""
        return self.log.decide(kind, [self.image(row) for row in rows])

    def image(self, row: int) -> Image:
        """How decisions name a row."""
        return Image(hash_text(self.hashes[row]), self.store.keys[row])

    @cached_property
    def _all_sets(self) -> Int[np.ndarray, " rows"]:
        return self.forest.sets(self.forest.limit)

    def _decide(self, decisions: Decisions) -> Decided:
        named = rows_named(decisions, self.hashes, lambda row: self.store.keys[row])
        rows = DecidedRows(named.apart, named.keep, named.remove)
        cut = cut_links(self.forest, rows.apart, self._all_sets) if len(rows.apart) else rows.keep[:0]
        before = self._decided
        same_forest = before is not None and np.array_equal(before.rows.apart, rows.apart)
        mask = np.zeros(self.store.rows, dtype=bool)
        mask[np.concatenate([rows.keep, rows.remove, rows.apart.ravel()])] = True
        at = before.at if before is not None and same_forest else SetsAt(self.forest.without(cut))
        obeyed = DecidedRows(
            keep=np.union1d(rows.keep, np.setdiff1d(self._protected, rows.remove)),
            remove=np.union1d(rows.remove, np.setdiff1d(self._dropped, rows.keep)),
        )
        return Decided(decisions, rows, obeyed, named.gone, at, mask)

    # Sets

    def sets(self, squared: float) -> Sets:
        """Every set at this threshold, without the links that decisions cut."""
        with self._lock:
            decided = self.decided
            if squared not in self._sets:
                while len(self._sets) >= _KEPT_IN_MEMORY:
                    self._sets.pop(next(iter(self._sets)))
                self._sets[squared] = decided.at.sets(squared)
            return self._sets[squared]

    def widths(self, sets: Sets) -> Float[np.ndarray, " sets"]:
        """The squared distance of the widest pair of each set, as far as the balance has measured it; else NaN."""
        return self._as_measured(sets)[0]

    def kept_count(self, sets: Sets) -> int | None:
        """How many images are kept with the decisions; None with `balance.max_radius`, which keeps more of a set."""
        if self.recipe.balance.max_radius is not None:
            return None
        rows = self.decided.obeyed
        keep, remove = np.zeros((2, self.store.rows), dtype=np.int64)
        keep[rows.keep] = remove[rows.remove] = 1
        to_keep, to_remove = sets.sum_of(keep), sets.sum_of(remove)
        of_sets = np.where(to_keep > 0, to_keep, to_remove < sets.size).sum()
        alone = self.ok - len(sets.rows) - int((sets.set_of_row[rows.remove] < 0).sum())
        return int(of_sets) + alone

    def kept_for(self, sets: Sets, numbers: Sequence[int], *, most: int | None = _MOST_CHOSEN) -> dict[int, int]:
        """For each row of these sets the row kept for it, -1 for none.

        Args:
            sets: At some threshold.
            numbers: Of the sets asked for.
            most: Choose for no more rows than these; sets beyond are left out.
        """
        decided, known = self.decided, self._as_measured(sets)[1]
        decided_about = decided.named | self._decided_then
        kept: dict[int, int] = {}
        to_choose: list[int] = []
        for number in numbers:
            rows = sets.members(number)
            if known[number] and not decided_about[rows].any():
                kept |= dict(zip(rows.tolist(), self._kept[self._set_of[rows]].tolist(), strict=True))
            elif most is None or len(rows) <= most:
                most = None if most is None else most - len(rows)
                to_choose.append(number)
        return kept | self._chosen(sets, to_choose, decided)

    def _chosen(self, sets: Sets, numbers: Sequence[int], decided: Decided) -> dict[int, int]:
        if not numbers:
            return {}
        from clip_cid.stages.balance import kept_of_sets  # PyTorch, without which the first page is there at once

        rows = np.concatenate([sets.members(number) for number in numbers])
        labels = np.repeat(np.arange(len(numbers)), sets.size[list(numbers)])
        order = np.argsort(rows)
        rows, labels = rows[order], labels[order]
        keep, remove = (np.flatnonzero(np.isin(rows, named)) for named in (decided.obeyed.keep, decided.obeyed.remove))
        local = DecidedRows(keep=keep, remove=remove)
        kept = kept_of_sets(self.folder, self.recipe, self.store, rows, labels, local)
        return dict(zip(rows.tolist(), kept.tolist(), strict=True))

    @cached_property
    def _marks(self) -> UInt64[np.ndarray, " rows"]:
        """A random number for each row: sets of equal sums hold the same rows."""
        return np.random.default_rng(0).integers(0, 2**64, self.store.rows, dtype=np.uint64)

    @cached_property
    def _measured(self) -> tuple[UInt64[np.ndarray, " sets"], Float[np.ndarray, " sets"]]:
        """The sum of marks of each whole set that the balance measured, ascending, and its width."""
        table, members = self._tables.sets, self._tables.every_member
        sums = np.add.reduceat(self._marks[members["row"]], np.cumsum(table["size"]) - table["size"])
        whole = table["size"] == table["component_size"]
        by_sum = np.argsort(sums[whole], kind="stable")
        return sums[whole][by_sum], to_squared(table["widest"], self.metric)[whole][by_sum]

    def _as_measured(self, sets: Sets) -> tuple[Float[np.ndarray, " sets"], Bool[np.ndarray, " sets"]]:
        """The width of each set that the balance measured as it is now, and which these are."""
        sums, widths = self._measured if len(self._tables.sets["set"]) else (np.zeros(0, np.uint64), np.zeros(0))
        own = sets.sum_of(self._marks)
        places = np.minimum(np.searchsorted(sums, own), max(0, len(sums) - 1))
        known = sums[places] == own if len(sums) else np.zeros(len(own), dtype=bool)
        return np.where(known, widths[places] if len(sums) else np.nan, np.nan), known

    # What is known of rows

    @cached_property
    def kind_of(self) -> Int[np.ndarray, " rows"]:
        """The place in `KINDS` of each row that the balance compared by its pixels."""
        kinds, members = np.zeros(self.store.rows, dtype=np.int8), self._tables.every_member
        kinds[members["row"]] = members["kind"]
        return kinds

    @cached_property
    def sources(self) -> tuple[list[str], Int[np.ndarray, " rows"]]:
        """Names of sources, and the number of each row's."""
        names = [_source(shard.name) for shard in self.store.info.shards]
        distinct = sorted({*names})
        of_shard = [distinct.index(name) for name in names]
        return distinct, np.repeat(of_shard, [shard.rows for shard in self.store.info.shards])

    def containing(self, text: str) -> Bool[np.ndarray, " rows"]:
        """The rows whose key or first caption contains this text, in large or small letters."""
        found = np.zeros(self.store.rows, dtype=bool)
        for texts in (self.store.keys.packed, self._captions):
            options = pc.MatchSubstringOptions(text, ignore_case=True)
            found |= pc.call_function("match_substring", [texts], options).to_numpy(zero_copy_only=False)
        return found

    def caption(self, row: int) -> str:
        """The first caption of a row; empty if it has none."""
        if "_captions" in self.__dict__:  # read beside the first page, which does without
            return self._captions[row].as_py()
        return next(iter(self.store.captions(row)), "")

    @cached_property
    def _captions(self) -> pa.LargeStringArray:
        return self.store.first_captions()


def _source(shard: str) -> str:
    """A shard's file or folder without its number: `data/noto-00003.tar` is of noto."""
    name = re.sub(r"(\.\w+)+$", "", PurePath(shard.partition("#")[0]).name)
    return re.sub(r"[-_]?\d+$", "", name) or name


def _file_of_decisions(folder: RunFolder, recipe: Recipe, named: Path | None) -> Path:
    """The file that decisions are read from and added to.

    Raises:
        DataError: It is at an address, where nothing can be added.
    """
    path = named or recipe.balance.decisions or folder.path / DECISIONS_FILE
    if address := os_errors.address_of(path):
        raise DataError(
            f"{without_secrets(address)}: decisions at an address can be obeyed, but not added to.",
            fix=f"Fetch the file, and name the copy: `clip-cid review {folder.path} --decisions FILE`.",
        )
    return path


def _check_same_embeddings(folder: RunFolder) -> None:
    balance, embed = folder.record(BALANCE), folder.record(EMBED)
    if balance is not None and embed is not None and balance.inputs.get(EMBED) != embed.results:
        raise RunError(
            f"{folder.path}: the embeddings were made again after the balance.",
            fix=f"Run `clip-cid balance {folder.path}` first; decisions hold for images whose embedding is as it was.",
        )
