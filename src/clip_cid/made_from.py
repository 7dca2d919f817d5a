"""What the results of a stage are made from, and whether that is still so: settings, earlier results, files.

One comparison serves finished results, unfinished work, and what was moved aside.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clip_cid import os_errors
from clip_cid.auto_numbers import Settled, settle
from clip_cid.data.embeddings.files_behind import missing_behind
from clip_cid.data.outside_files import Outside, Reader
from clip_cid.deciding_settings import DEFAULTS, OF_FILES, deciding
from clip_cid.errors import DataError, RunError
from clip_cid.file_digests import digest
from clip_cid.older_records import inputs_then
from clip_cid.recipe import AUTO, Recipe, auto_settings
from clip_cid.run_folder import RunFolder, StageRecord
from clip_cid.stage_names import BALANCE, EMBED
from clip_cid.stages.facts import BY_NAME, EMBED_VIEWS, Stage

_DEFAULTS = {**DEFAULTS, EMBED_VIEWS: "0"}
_PLACES = (
    "pairs.source",
    "embed.existing",
    "embed.teacher",
    "embed.pretrained",
    "balance.existing",
    "balance.decisions",
    "cluster.existing",
    "distill.texts",
    "distill.student",
    "distill.pretrained",
    "distill.text_tower",
    "distill.validation.sets",
    "evaluate.sets",
    "evaluate.retrieval",
    "evaluate.compare",
)
"""Settings that say where files are."""


@dataclass(frozen=True)
class MadeFrom:
    """All that decides the results of a stage."""

    version: int
    settings: dict[str, Any]
    """Those that decide the results (`deciding`)."""
    inputs: dict[str, str]
    """Stage -> its `results`, and setting -> the contents of its files."""

    @property
    def key(self) -> str:
        return digest(self.as_json())

    def as_json(self) -> dict[str, Any]:
        return {"version": self.version, "settings": self.settings, "inputs": self.inputs}


class Origins:
    """What each stage of a run would be made from under a recipe."""

    def __init__(self, folder: RunFolder, recipe: Recipe, active: tuple[Stage, ...]) -> None:
        self._folder, self._recipe, self._active = folder, recipe, {stage.name for stage in active}
        writable = not folder.read_only and os.access(folder.path, os.W_OK)
        index = folder.index if writable and (folder.index.is_dir() or not os.path.lexists(folder.index)) else None
        self._reader = Reader(folder.digests, index, recipe.machine.cache_dir)

    def settled(self) -> Settled:
        """The recipe with a number for each `auto`, as soon as it is known how many pairs are kept."""
        kept = self._kept() if auto_settings(self._recipe) else None
        return Settled(self._recipe) if kept is None else settle(self._recipe, kept)

    def of(self, stage: Stage, *, parts: bool = False) -> MadeFrom:
        """All that would decide the results now; files that are not known are read.

        Args:
            stage: The stages it needs have run.
            parts: Also the inputs that unfinished work knows part by part.

        Raises:
            DataError: Pairs contradict themselves.
        """
        inputs = self.earlier_results(stage)
        for setting, outside in self.outside(stage).items():
            if parts or setting not in stage.in_parts:
                inputs[setting] = outside.contents()
        return MadeFrom(stage.version, deciding(self._settings(stage)), inputs)

    def outside(self, stage: Stage) -> dict[str, Outside]:
        """The files made elsewhere that are here."""
        every = stage.outside(self._recipe, self._reader)
        return {setting: outside for setting, outside in every.items() if outside.is_here()}

    def states(self, stage: Stage) -> dict[str, str]:
        """The state of each file made elsewhere, to see whether one changed while the stage read it."""
        return {setting: outside.state() for setting, outside in self.outside(stage).items()}

    def earlier_results(self, stage: Stage) -> dict[str, str]:
        """The results of the stages it needs, as far as they are there."""
        records = {need: whole_record(self._folder, need) for need in stage.needs if need in self._active}
        return {need: record.results for need, record in records.items() if record is not None}

    def difference(self, stage: Stage, record: StageRecord, *, earlier: bool = True) -> str:
        """Why results are not what the stage would make now, in words; empty if they are.

        Args:
            stage: The stage.
            record: Of the results.
            earlier: Whether to compare the results of the stages it needs.
        """
        wanted = self._settings(stage)
        if changes := different_settings(deciding(record.settings), deciding(wanted)):
            return "; ".join(changes)
        if record.version != stage.version:
            return f"made by an older version of {stage.name}"
        if missing := _fields_missing(stage, record.settings, wanted):
            return f"pairs.keep_fields: {', '.join(missing)} not stored yet"

        if earlier:
            now = self.earlier_results(stage)
            before = {name: value for name, value in record.inputs.items() if name in BY_NAME}
            for name in sorted(now.keys() | before.keys()):
                if now.get(name) != before.get(name):
                    return f"{name} was run again"
        return self._files_changed(stage, record)

    def difference_of_work(self, stage: Stage, before: Mapping[str, Any]) -> str:
        """How unfinished work differs from what the stage would do now, in words; empty if it can be resumed."""
        made, inputs = dict(before), dict(before.get("inputs", {}))
        if changes := different_settings(made.get("settings", {}), deciding(self._settings(stage))):
            return "; ".join(changes)
        if made.get("version") != stage.version:
            return f"made by an older version of {stage.name}"
        now = self.of(stage).inputs
        for name in sorted(now.keys() | inputs.keys()):
            if now.get(name) != inputs.get(name):
                if name in BY_NAME:
                    return f"{name} was run again"
                return f"other files behind {name}" if name in now else f"{name}: its files are not there"
        return ""

    def missing_behind(self, stage: Stage) -> str:
        """The first file that finished results refer to and that is gone, though it could be found again."""
        existing = self._recipe.embed.existing
        if stage.name != EMBED or existing is None or not (os_errors.address_of(existing) or existing.exists()):
            return ""
        missing = missing_behind(self._folder.path / EMBED)
        return f"{missing[0]} is missing" if missing else ""

    def _settings(self, stage: Stage) -> dict[str, Any]:
        return stage.settings(self.settled().recipe)

    def _kept(self) -> int | None:
        """How many images are kept; without a teacher, how many pairs there are. None if that is not known."""
        if not self._recipe.has_teacher:
            return self._num_pairs
        which, count = (BALANCE, "kept") if BALANCE in self._active else (EMBED, "ok")
        record = whole_record(self._folder, which)
        kept = None if record is None else record.summary.get(count)
        return None if kept is None else int(kept)

    @cached_property
    def _num_pairs(self) -> int | None:
        return self._reader.num_pairs(self._recipe.pairs)

    def _files_changed(self, stage: Stage, record: StageRecord) -> str:
        """The first change of files made elsewhere, in words; empty if there is none."""
        if not record.by_contents:
            return self._files_changed_as_then(stage, record)

        every = stage.outside(_with_fields_of(self._recipe, stage, record), self._reader)
        for setting in sorted(every.keys() | (record.inputs.keys() - BY_NAME.keys())):
            if (outside := every.get(setting)) is None:
                return f"{setting} is not given any more"
            if change := self._change_of(setting, outside, stage, record):
                return change
        return ""

    def _files_changed_as_then(self, stage: Stage, record: StageRecord) -> str:
        """As the older version that wrote the record would say."""
        then = {name: value for name, value in record.inputs.items() if name not in BY_NAME}
        now = inputs_then(stage.name, self._recipe)
        changed = [name for name in now if now[name] != then.get(name)]
        gone = [name for name in then if name not in now and _names_other_places(record, stage, self._recipe)]
        return next((f"{name} changed on disk" for name in sorted(changed + gone)), "")

    def _change_of(self, setting: str, outside: Outside, stage: Stage, record: StageRecord) -> str:
        before, where = record.inputs.get(setting), ", ".join(outside.where)
        place_then, place_now = (
            _place(settings, setting) for settings in (record.settings, stage.settings(self._recipe))
        )
        moved = place_then != place_now

        # Only a stage that runs asks for its files; but these must be the ones it was made from.
        if not outside.is_here():
            return f"{setting}: nothing at {where}" if moved else ""
        if before is None and outside.as_before() is not None:
            return f"{setting} ({where}) was not there"

        try:
            if before == outside.as_before() or before == outside.contents():
                return ""
        except (DataError, OSError) as error:
            if os_errors.may_pass(error) or os_errors.may_pass(error.__cause__):
                raise  # nobody knows whether it has changed
            return f"{setting} changed on disk ({error.problem if isinstance(error, DataError) else error})"
        return (
            f"{setting} {_short(place_then)} -> {_short(place_now)}"
            if moved
            else f"{setting} ({where}) changed on disk"
        )


def whole_record(folder: RunFolder, stage: str) -> StageRecord | None:
    """The record of a finished stage; None if there is none that can be read."""
    try:
        return folder.record(stage)
    except RunError:
        return None


def different_settings(before: Any, after: Any) -> list[str]:
    """Settings that differ, as `balance.threshold 0.07 -> 0.06`; those of an earlier version are named as such."""
    return list(_differences(before, after, _DEFAULTS, ""))


def _differences(before: Any, after: Any, defaults: Any, name: str) -> Iterator[str]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before is None and after == OF_FILES:
            yield f"{name} is given now"
        elif after == AUTO and isinstance(before, int):
            return  # what it would be now, only the data can say, and they are not here
        elif before != after:
            yield f"{name} {_short(before)} -> {_short(after)}"
        return
    for part in sorted(before.keys() | after.keys()):
        full_name = f"{name}.{part}" if name else str(part)
        default = defaults.get(part) if isinstance(defaults, dict) else None
        known = isinstance(defaults, dict) and part in defaults
        if part not in after and name and not known:
            yield (
                f"{full_name} is no longer a setting" if name.count(".") == 0 else f"{full_name} is not given any more"
            )
        else:
            # What an earlier version did not have, or `deciding` leaves out, is as it is by default.
            yield from _differences(before.get(part, default), after.get(part, default), default, full_name)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_missing(stage: Stage, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    if "pairs.source" not in stage.in_parts:
        return []
    stored = set(before.get("pairs", {}).get("keep_fields", ()))
    return [field for field in wanted["pairs"]["keep_fields"] if field not in stored]


def _with_fields_of(recipe: Recipe, stage: Stage, record: StageRecord) -> Recipe:
    """The recipe, with the fields that the record kept: more of them than are wanted do no harm."""
    if "pairs.source" not in stage.in_parts:
        return recipe
    kept = tuple(record.settings.get("pairs", {}).get("keep_fields", ()))
    return recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"keep_fields": kept})})


def _place(settings: Mapping[str, Any], setting: str) -> Any:
    """The value of a setting by its dotted name, the last part of which may be the name of an entry."""
    value: Any = settings
    while setting and isinstance(value, dict):
        name, _, rest = (setting, "", "") if setting in value else setting.partition(".")
        value, setting = value.get(name), rest
    return value


def _names_other_places(record: StageRecord, stage: Stage, recipe: Recipe) -> bool:
    """Whether a record of an older version was made from files that the recipe names otherwise now."""
    wanted = stage.settings(recipe)
    return any(
        _place(record.settings, name) != _place(wanted, name) for name in _PLACES if name.split(".")[0] in wanted
    )
