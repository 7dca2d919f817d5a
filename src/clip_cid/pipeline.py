"""The order of the stages, the check for stale ones, and the run of those.

Nothing here imports torch: the module of a stage is imported only when the stage runs, so `status` and
a finished run are quick.
"""

import contextlib
import dataclasses
import importlib
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import threadpoolctl

from clip_cid import engine, extras, log, os_errors, units
from clip_cid.data.inputs import brought_here
from clip_cid.deciding_settings import deciding
from clip_cid.errors import ClipCidError, ConfigError, RunError
from clip_cid.file_digests import digest
from clip_cid.made_from import Origins, whole_record
from clip_cid.recipe import Recipe, dump_recipe
from clip_cid.run_folder import MANIFEST, Begun, RunFolder, StageRecord, atomic_file, now, own_mark
from clip_cid.stage_names import BALANCE, DISTILL, EVALUATE, REPORT
from clip_cid.stages.facts import BY_NAME, STAGES, Stage
from clip_cid.summaries import BalanceSummary, EvaluateSummary, ReportSummary, as_json, read_summary
from clip_cid.tasks import torchrun_place
from clip_cid.training.so_far import PAGE as TRAINING_PAGE
from clip_cid.training.so_far import TrainingSoFar

if TYPE_CHECKING:
    from clip_cid.report.training_page import Standing
    from clip_cid.training.ranks.distributed import Ranks

RECIPE_FILE = "recipe.yaml"
WATCH_SECONDS = 10
"""Between two writings of a page that is watched."""
_PACKAGES = ("clip-cid", "torch", "open_clip_torch", "numpy", "scipy", "scikit-learn", "pillow", "pyarrow")


@dataclasses.dataclass(frozen=True)
class State:
    """Where a stage of a run stands."""

    stage: Stage
    status: str
    """done, stale, missing, or off (the recipe does not use it)."""
    reason: str
    record: StageRecord | None
    resumes: bool = False
    """A killed attempt has left work that can be resumed."""


def active_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages a recipe uses, in order."""
    return tuple(stage for stage in STAGES if recipe.uses(stage.name))


def states(folder: RunFolder, recipe: Recipe, active: tuple[Stage, ...] | None = None) -> list[State]:
    """Each stage's state under this recipe, with the reason in words.

    Args:
        folder: The run folder.
        recipe: The settings.
        active: Of the stages that the recipe uses, those to look at; the others count as not used.
    """
    active = active_stages(recipe) if active is None else active
    origins = Origins(folder, recipe, active)
    of_stages: list[State] = []
    will_run: dict[str, str] = {}  # stage -> the reason it gives to those after it
    for stage in STAGES:
        if stage not in active:
            of_stages.append(State(stage, "off", "not used by this recipe", None))
            continue

        record = whole_record(folder, stage.name)
        reason = _reason(stage, folder, record, will_run, origins)
        if record is not None and not reason:
            of_stages.append(State(stage, "done", "", record))
            continue

        resumes = _can_resume(stage, folder, origins)
        if record is None and not reason:
            of_stages.append(State(stage, "missing", "has not run yet", None, resumes))
            will_run[stage.name] = f"{stage.name} has not run yet"
        else:
            of_stages.append(State(stage, "stale", reason, record, resumes))
            will_run[stage.name] = f"{stage.name} runs again"
    return of_stages


def require_current(folder: RunFolder, recipe: Recipe, name: str) -> None:
    """Refuse the results of a stage that are of other settings or inputs than the recipe's.

    Raises:
        ConfigError: The recipe does not use the stage.
        RunError: It is stale. (One that has not run is left to those who open it.)
    """
    try:
        state = next(state for state in states(folder, recipe) if state.stage.name == name)
    except ClipCidError as error:
        log.warn(f"{folder.path}: whether {name} is up to date cannot be told ({error.problem})")
        return
    if state.status == "off":
        raise ConfigError(
            f"{folder.path}: the run's recipe does not use {name}.", fix="It is switched off by its settings."
        )
    if state.status == "stale":
        raise RunError(
            f"{folder.path}: {name} is stale ({state.reason}), so its results are not those of the run's recipe.",
            fix=f"Run `clip-cid {name} {folder.path}` first, or `clip-cid run {folder.path}` for all.",
        )


def run(
    folder: RunFolder, recipe: Recipe, *, only: str | None = None, until: str | None = None, force: bool = False
) -> None:
    """Run the stages that are missing or stale, in order, and say why. Stages that are up to date do not run.

    Args:
        folder: The run folder; created when it does not exist.
        recipe: The settings; stored beside the results.
        only: Run this one stage only; the stages it needs must be done. A stage that shows what is there leaves out
            those that have not run.
        until: The last stage to run; all after it stay as they are.
        force: Also run stages that are up to date.

    Raises:
        ClipCidError: As the stages raise it; results of other stages stay whole.
    """
    with joint_ranks(only) as ranks:
        if ranks is None:
            _run(folder, recipe, only=only, until=until, force=force, call=lambda _: None)
        elif ranks.rank > 0:
            _assist(folder, recipe, BY_NAME[str(only)], ranks)
        else:
            others = _Others(folder, ranks)
            _run(folder, recipe, only=only, until=until, force=force, call=others.call)
            others.dismiss()


@contextlib.contextmanager
def joint_ranks(only: str | None) -> "Generator[Ranks | None]":
    """The processes of torchrun, which are together for as long as the block lasts; None without torchrun.

    An error in one of them ends all, with the same two lines.

    Raises:
        ConfigError: Several processes cannot share what is to be run.
        RunError: Some processes do not come, or one has ended.
    """
    if torchrun_place().size == 1:
        yield None
        return
    _check_ranks(only)
    from clip_cid.training.ranks.distributed import meet_ranks

    with meet_ranks() as ranks:
        yield ranks


def _run(
    folder: RunFolder,
    recipe: Recipe,
    *,
    only: str | None,
    until: str | None,
    force: bool,
    call: Callable[[Path], None],
) -> None:
    """Run stages as the only process, or as the main one of torchrun, which has the others called to a joint stage."""
    require_extras(folder, recipe, only=only, until=until, force=force)
    with folder.lock(), log.to_file(folder.path / "run.log"):
        active = _up_to(until, active_stages(recipe))
        todo = active if only is None else _with_imports(BY_NAME[only], recipe, active)
        if only is not None:
            active = _check_only(folder, recipe, BY_NAME[only], todo, active)

        # The folder belongs to this recipe as soon as a stage has accepted it.
        folder.when_accepted(lambda: _store_recipe(folder, recipe))
        for stage in todo:
            forced = force and only in (None, stage.name)
            _bring_up_to_date(stage, folder, recipe, active, forced=forced, call=call)
            if stage.name == BALANCE:
                _show_balance(folder, recipe)
            elif stage.name == DISTILL:
                _end_training_page(folder, recipe)
        folder.accept()

        if only is None:
            _say_outcome(folder, active)


def _up_to(until: str | None, active: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages up to this one."""
    if until is None:
        return active
    names = [stage.name for stage in active]
    if until not in names:
        raise ConfigError(f"--until {until}: this recipe does not use the stage.", fix=f"It uses {', '.join(names)}.")
    return active[: names.index(until) + 1]


def _show_balance(folder: RunFolder, recipe: Recipe) -> None:
    """Write the page of the balance, if it is not there, where the parts that draw it are installed."""
    if lacking := extras.absent(extras.REPORT):
        log.info(f'balance   no balance.html without {", ".join(lacking)}: pip install "clip-cid[report]"')
        return
    from clip_cid.report.balance_page import write_balance_page

    with os_errors.explained(folder.path, kept="The balance itself is whole."):
        if (page := write_balance_page(folder, recipe)) is not None:
            log.info(f"balance   {page} shows it")


def _end_training_page(folder: RunFolder, recipe: Recipe) -> None:
    """A page of the training from before its end must not go on saying that it is unfinished."""
    page, record = folder.path / TRAINING_PAGE, folder.path / DISTILL / MANIFEST
    if not page.is_file() or page.stat().st_mtime_ns > record.stat().st_mtime_ns or extras.absent(extras.REPORT):
        return
    from clip_cid.report.training_page import write_training_page

    with os_errors.explained(folder.path, kept="The training itself is whole."):
        write_training_page(folder, recipe, "finished")


def show_training(folder: RunFolder, recipe: Recipe, *, watch: bool = False) -> bool:
    """Write the page of a training that has not finished, also beside the process that trains; it takes no lock.

    A page that is there of a training that has finished meanwhile is written once more, and says so.

    Args:
        folder: The run folder.
        recipe: The settings.
        watch: Write it again and again until nobody trains any more, or until Ctrl-C; the page loads itself again.

    Returns:
        Whether it shows all that there is to show now: a process trains, or no stage has finished yet.

    Raises:
        RunError: It is to be watched, and nobody trains here nor is about to.
    """
    if watch:
        _watch_training(folder, recipe)
        return True
    standing = _standing(folder, recipe)
    if standing is None or (standing == "finished" and not (folder.path / TRAINING_PAGE).is_file()):
        return False

    with os_errors.explained(folder.path, kept="The training is not touched."):
        standing = _write_training_page(folder, recipe)
    if standing == "finished":
        return False
    log.info(f"report    {folder.path / TRAINING_PAGE} shows the unfinished training: {_so_far(folder)}")
    return standing == "running" or not any(folder.has(name) for name in BY_NAME[REPORT].needs)


def _watch_training(folder: RunFolder, recipe: Recipe) -> None:
    standing, waits, page = _standing(folder, recipe), False, folder.path / TRAINING_PAGE
    try:
        while (work := folder.at_work()) is not None and standing != "finished":
            if standing == "running":
                _write_training_page(folder, recipe, refresh=WATCH_SECONDS)
                log.info(f"report    {page}: {_so_far(folder)}")
            elif not waits:
                waits = True
                log.info(f"report    waiting for the training to begin; {work.stage or work.holder} is at work")
            time.sleep(WATCH_SECONDS)
            standing = _standing(folder, recipe)
    finally:  # the page must not wait for a command that has ended
        standing = _write_training_page(folder, recipe)

    if standing is None:
        raise RunError(
            f"{folder.path}: nobody trains here, and no training waits to be resumed.",
            fix=f"Start it in another terminal: clip-cid run {folder.path}.",
        )
    end = "the training has finished" if standing == "finished" else "nobody holds the run folder any more"
    log.info(f"report    {page}: {end}")


def _write_training_page(folder: RunFolder, recipe: Recipe, *, refresh: int | None = None) -> "Standing | None":
    """Write the page of the training as it stands, which is returned; None if there is none."""
    from clip_cid.report.training_page import write_training_page

    for may_have_ended in (True, False):
        standing = _standing(folder, recipe)
        if standing is None:
            return None
        try:
            write_training_page(folder, recipe, standing, refresh=refresh)
            return standing
        except (RunError, FileNotFoundError):  # its folder has just got its final name
            if not may_have_ended:
                raise
    return None


def _so_far(folder: RunFolder) -> str:
    return str(TrainingSoFar.unfinished(folder) or "it has just ended")


def _standing(folder: RunFolder, recipe: Recipe) -> "Standing | None":
    """How the training of a run stands; None if it has not begun."""
    begun, work = folder.unfinished(DISTILL) is not None, folder.at_work()
    if begun and work is not None and work.stage == DISTILL:
        return "running"
    if not recipe.uses(DISTILL) or not (begun or folder.has(DISTILL)):
        return None
    state = next(state for state in states(folder, recipe) if state.stage.name == DISTILL)
    if state.status == "done":
        return "finished"
    return "stopped" if begun else None


def require_extras(
    folder: RunFolder, recipe: Recipe, *, only: str | None = None, until: str | None = None, force: bool = False
) -> None:
    """Refuse before the first stage what a later one would be refused for.

    Raises:
        MissingExtraError: An optional part that a stage needs is not installed; all of them are named.
    """
    stages = [stage for stage in _up_to(until, active_stages(recipe)) if only in (None, stage.name)]
    lacking = [stage for stage in stages if any(map(extras.absent, stage.extras(recipe)))]
    if not lacking:  # as most often; the states take their time
        return

    done = set() if force else {state.stage for state in states(folder, recipe) if state.status == "done"}
    if lacking := [stage for stage in lacking if stage not in done]:
        extras.require(lacking[0].name, *(extra for stage in lacking for extra in stage.extras(recipe)))


def take_over(folder: RunFolder, recipe: Recipe, others: Sequence[RunFolder]) -> None:
    """Adopt stages that other runs have finished, from the first on, if they are not current here.

    A stage is adopted if it is what this run would make. The first one that is not adopted ends this; if it grows and
    has no results here, it is given those of other settings to build upon.
    """
    with folder.lock():
        active = active_stages(recipe)
        origins = Origins(folder, recipe, active)
        for other in others:
            folder.digests.learn_from(other.digests)

        for stage in active:
            own = whole_record(folder, stage.name)
            if own is not None and not origins.difference(stage, own):
                continue

            finished = [(other, record) for other in others if (record := whole_record(other, stage.name)) is not None]
            lender = _first_whole(stage, [other for other, record in finished if not origins.difference(stage, record)])
            if lender is None:
                if stage.grows and own is None:
                    inputs = origins.of(stage, parts=True).inputs
                    lender = _first_whole(stage, [other for other, record in finished if record.inputs == inputs])
                    if lender is not None:
                        folder.adopt(stage.name, lender)
                return

            folder.adopt(stage.name, lender, keep_old=stage.costly)
            log.info(f"{stage.name:<9} taken over from {lender.path}")


def _first_whole(stage: Stage, lenders: Sequence[RunFolder]) -> RunFolder | None:
    return next((lender for lender in lenders if not lender.changed_files(stage.name, digests=False)), None)


def footprint(stage: Stage, recipe: Recipe) -> str:
    """A digest of all settings behind a stage's results: on the same files, equal footprints give equal results."""
    used = [BY_NAME[need] for need in stage.needs if recipe.uses(need)]
    return digest([deciding(stage.settings(recipe)), stage.version, *(footprint(need, recipe) for need in used)])


def verify(folder: RunFolder) -> list[str]:
    """Read every byte of every finished stage and compare it with its record; returns what differs."""
    changes: list[str] = []
    done = [stage.name for stage in STAGES if folder.has(stage.name)]
    if not done:
        raise RunError(
            f"{folder.path}: no finished stage here.", fix=f"Run `clip-cid run {folder.path} --recipe FILE`."
        )
    for name in done:
        changed = folder.changed_files(name, digests=True)
        changes += [f"{name}: {change}" for change in changed]
        record = folder.record(name)
        count = len(record.files) if record else 0
        log.info(f"{name:<9} {units.counted(count, 'file')} {'CHANGED' if changed else 'as they were written'}")
    return changes


def headline(record: StageRecord | None, run: Path) -> str:
    """The summary of a stage of a run in one line, and how long it took."""
    if record is None:
        return ""
    summary = read_summary(BY_NAME[record.stage].summary, record.summary)
    if isinstance(summary, ReportSummary):  # where the run is now
        summary = dataclasses.replace(summary, page=str(run / REPORT / Path(summary.page).name))
    return f"{summary} in {units.duration(record.seconds)}"


def _say_outcome(folder: RunFolder, active: tuple[Stage, ...]) -> None:
    """The results of the stages of a run: the removed share against the known truth, and the models' mean scores."""
    records = {stage.name: folder.record(stage.name) for stage in active}

    if (record := records.get(BALANCE)) is not None:
        balance = read_summary(BalanceSummary, record.summary)
        if (truth := balance.truth) is not None:
            log.say(
                f"Removed {units.percent(balance.removed_share)} of the images; {units.percent(truth.redundant_share)}"
                f" are redundant by {truth.field!r} (pairs in one set: precision {truth.precision:.3f},"
                f" recall {truth.recall:.3f})."
            )

    if (record := records.get(EVALUATE)) is not None:
        evaluate = read_summary(EvaluateSummary, record.summary)
        rows: list[list[str]] = []
        for model, scores in evaluate.models.items():
            means = (scores.get(f"{task}_mean", scores.get(task)) for task in evaluate.mean_of)
            rows.append([model, *("-" if mean is None else units.percent(mean) for mean in means)])
        names = (f"{task.replace('_', ' ')} (mean of {sets})" for task, sets in evaluate.mean_of.items())
        log.table(["model", *names], rows)


def _store_recipe(folder: RunFolder, recipe: Recipe) -> None:
    with atomic_file(folder.path / RECIPE_FILE) as temporary:
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")


def _bring_up_to_date(
    stage: Stage,
    folder: RunFolder,
    recipe: Recipe,
    active: tuple[Stage, ...],
    *,
    forced: bool,
    call: Callable[[Path], None],
) -> None:
    """Run a stage that is missing, stale or forced."""
    origins = Origins(folder, recipe, active)
    state = next(state for state in states(folder, recipe, active) if state.stage is stage)
    if state.status == "done" and not forced:
        log.info(f"{stage.name:<9} up to date   {headline(state.record, folder.path)}")
        if not stage.resumable:  # what a killed --force has left is of no use to anybody
            folder.drop_unfinished(stage.name)
        return

    if (lost := folder.lost(stage.name)) and not forced:
        raise RunError(
            f"{folder.path}: {lost}.",
            fix="Bring back what was there, such as a disk that is not mounted; or remove the link, or give --force,"
            " to make the stage again.",
        )

    # The same settings may have been used before.
    if not forced:
        for aside, record in folder.finished_asides(stage.name):
            if not origins.difference(stage, record):
                folder.take_back(stage.name, aside)
                log.info(f"{stage.name:<9} back from {aside}   {headline(record, folder.path)}")
                return _bring_up_to_date(stage, folder, recipe, active, forced=False, call=call)

    if forced:
        folder.forget(stage.name)
        if folder.drop_unfinished(stage.name):
            log.info(f"{stage.name:<9} forced: what was left unfinished is dropped")
    why = "forced" if state.status == "done" else f"{state.status}: {state.reason}"
    log.info(f"{stage.name:<9} {why}; {'resuming' if state.resumes and not forced else 'running'}")
    _run_stage(stage, folder, recipe, origins, call=call)


def _run_stage(
    stage: Stage, folder: RunFolder, recipe: Recipe, origins: Origins, *, call: Callable[[Path], None]
) -> None:
    """Run a stage and publish its results; a refused one leaves everything as it was."""
    settled = origins.settled()
    recipe = settled.recipe
    for choice in settled.choices:
        if stage.concerns(choice.setting):
            log.info(f"{stage.name:<9} {choice.setting}: auto is {choice.value:,} ({choice.why})")

    started, clock = now(), time.monotonic()
    what = f"; {stage.name} could not write its results"
    with os_errors.explained(folder.part(stage.name), what=lambda: what, kept="Earlier results are whole."):
        for need in stage.verifies:
            folder.verify(need)

        folder.accepted = False
        begun = _begin(stage, folder, origins)
        states_before = origins.states(stage)
        try:
            module = importlib.import_module(f"clip_cid.stages.{stage.name}")
            if stage.joint:
                call(begun.part)
            with (
                threadpoolctl.threadpool_limits(recipe.machine.threads or None),
                engine.released(recipe.machine),
                brought_here(recipe, {stage.name}) as with_copies,
            ):
                summary = module.run(folder, begun.part, with_copies)
        except BaseException:
            if not folder.accepted:
                folder.refuse(begun)
            raise
        folder.accept()

        _check_unchanged(stage, states_before, origins.states(stage))
        made_from = origins.of(stage, parts=True)
        before = whole_record(folder, stage.name)
        record = StageRecord(
            stage=stage.name,
            key=made_from.key,
            version=stage.version,
            settings=stage.settings(recipe),
            inputs=made_from.inputs,
            summary=as_json(summary),
            versions=_versions(),
            device=_device(recipe),
            started=started,
            seconds=round(time.monotonic() - clock, 3),
            by_contents=True,
            equals=before.results if before is not None and folder.holds_the_same(stage.name) else None,
        )
        keep_old = stage.costly and not folder.forgets(stage.name) and not folder.holds_all_of_before(stage.name)
        log.info(f"{stage.name:<9} {headline(folder.publish(record, keep_old=keep_old), folder.path)}")


def _begin(stage: Stage, folder: RunFolder, origins: Origins) -> Begun:
    """The work folder of a stage; unfinished work of other settings is moved aside, with a word once it stays there."""
    left = folder.unfinished(stage.name)
    begun = folder.begin(stage.name, origins.of(stage).as_json(), resumable=stage.resumable)
    if begun.aside is not None:
        if left is None:
            what = (
                f"unfinished work of an older version, or damaged, is kept in {begun.aside}; this version cannot"
                " resume it as it is"
            )
        else:
            why = origins.difference_of_work(stage, left)
            what = (
                f"unfinished work of other settings ({why}) is kept in {begun.aside}; the same settings again resume it"
            )
        folder.when_accepted(lambda: log.warn(f"{stage.name}: {what}; delete that folder if you do not need it"))
    return begun


def _check_unchanged(stage: Stage, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """No file made elsewhere changed while the stage read it."""
    changed = [setting for setting in before if after.get(setting) != before[setting]]
    if changed:
        raise RunError(
            f"{', '.join(changed)}: files changed while {stage.name} read them, so its results are of neither.",
            fix="Run the same command again when nobody writes there; what has not changed is not done again.",
        )


def _check_ranks(only: str | None) -> None:
    """Several processes of torchrun can share one stage only."""
    joint = [stage.name for stage in STAGES if stage.joint]
    if only not in joint:
        raise ConfigError(
            f"torchrun has started several processes, but only the {joint[0]} stage can use them.",
            fix=f"Run the other stages first, without torchrun; then: torchrun ... -m clip_cid {joint[0]} RUN.",
        )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the main process writes and says before a joint stage: the others see the same run folder, or all end."""

    sign: str
    """A file that it has just made in the stage's work folder, of a name that nobody has used before."""
    results: dict[str, str]
    """Of every finished stage."""
    host: str


class _Others:
    """The other processes of torchrun. They leave the run folder alone until the main process calls them."""

    def __init__(self, folder: RunFolder, ranks: "Ranks") -> None:
        self._folder, self._ranks, self._called = folder, ranks, False

    def call(self, part: Path) -> None:
        """Have them join the stage that begins in `part`, as soon as each of them sees what it needs."""
        self._called = True
        sign = part / f".shared.tmp-{own_mark()}"
        sign.touch()
        try:
            self._ranks.from_main(_Call(sign.name, _results(self._folder), socket.gethostname()))
            self._ranks.wait()
        finally:
            sign.unlink()

    def dismiss(self) -> None:
        """There is nothing for them to do, if they have not been called."""
        if not self._called:
            self._ranks.from_main(None)


def _assist(folder: RunFolder, recipe: Recipe, stage: Stage, ranks: "Ranks") -> None:
    """Do this process's part of a stage; the main process keeps its folder, record and log.

    Raises:
        RunError: This host has another run folder.
    """
    call = ranks.from_main(None)
    if not isinstance(call, _Call):
        return

    part = folder.part(stage.name)
    if not ranks.sees(lambda: (part / call.sign).exists() and call.results == _results(folder)):
        here = socket.gethostname()
        raise RunError(
            f"{folder.path}: rank {ranks.rank} on {here} does not see what rank 0 on {call.host} has written there.",
            fix="The run folder must be a shared one: give a path at which every host has the same folder.",
        )
    ranks.wait()
    require_extras(folder, recipe, only=stage.name, force=True)
    settled = Origins(folder, recipe, active_stages(recipe)).settled()
    module = importlib.import_module(f"clip_cid.stages.{stage.name}")
    with threadpoolctl.threadpool_limits(recipe.machine.threads or None):
        module.run(folder, part, settled.recipe)


def _results(folder: RunFolder) -> dict[str, str]:
    records = {stage.name: whole_record(folder, stage.name) for stage in STAGES}
    return {name: record.results for name, record in records.items() if record is not None}


def _with_imports(stage: Stage, recipe: Recipe, active: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """A stage that runs alone, after those it needs that only import files made elsewhere, or draw for its page."""
    sections = {used: getattr(recipe, used.name, None) for used in active}
    before = {used for used, section in sections.items() if getattr(section, "existing", None) is not None}
    if stage.shows:
        before |= {used for used in active if used.shows}
    return tuple(used for used in active if used is stage or (used.name in stage.needs and used in before))


def _check_only(
    folder: RunFolder, recipe: Recipe, stage: Stage, todo: tuple[Stage, ...], active: tuple[Stage, ...]
) -> tuple[Stage, ...]:
    """One stage alone must be one the recipe uses, and what it needs must be done and current.

    Returns:
        The active stages that count: all, but for a stage that shows what is there without those that have not run.
    """
    if stage not in active:
        raise ConfigError(
            f"{stage.name}: this recipe does not use the stage.",
            fix="Which stages there are depends on embed.teacher, balance.enabled, distill.weights, distill.texts,"
            " evaluate.sets and evaluate.retrieval.",
        )
    needed = [
        state
        for state in states(folder, recipe, active)
        if state.stage.name in stage.needs and state.stage not in todo and state.status not in ("done", "off")
    ]
    left_out = [state.stage for state in needed if stage.shows and state.status == "missing"]
    for state in needed:
        if state.stage not in left_out:
            raise RunError(
                f"{folder.path}: {stage.name} needs {state.stage.name}, which is {state.status} ({state.reason}).",
                fix=f"Run `clip-cid {state.stage.name} {folder.path}` first, or `clip-cid run {folder.path}` for all.",
            )

    if left_out and not any(folder.has(name) for name in stage.needs):
        raise RunError(
            f"{folder.path}: no stage has finished here, so there is nothing to {stage.name}.",
            fix=f"Run `clip-cid {active[0].name} {folder.path}` first, or `clip-cid run {folder.path}` for all.",
        )
    if left_out:
        names = ", ".join(used.name for used in left_out)
        log.info(f"{stage.name:<9} without {names}, which {'has' if len(left_out) == 1 else 'have'} not run")
    return tuple(used for used in active if used not in left_out)


def _can_resume(stage: Stage, folder: RunFolder, origins: Origins) -> bool:
    """Whether unfinished work of the same settings and inputs is there."""
    if not stage.resumable or (left := folder.unfinished(stage.name)) is None:
        return False
    try:
        return not origins.difference_of_work(stage, left)
    except (ClipCidError, OSError):  # it will be said when the stage runs
        return False


def _reason(
    stage: Stage, folder: RunFolder, record: StageRecord | None, will_run: dict[str, str], origins: Origins
) -> str:
    """Why a finished stage is not current, in words; empty when it is."""
    if record is None:
        damage = folder.damage(stage.name)
        return f"its record cannot be read ({damage})" if damage else folder.lost(stage.name)

    # What it was made from.
    needs = next((will_run[need] for need in stage.needs if need in will_run), "")
    if difference := origins.difference(stage, record, earlier=not needs) or needs:
        return difference

    # What it wrote, and what that refers to.
    return "; ".join(folder.changed_files(stage.name, digests=False)) or origins.missing_behind(stage)


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _device(recipe: Recipe) -> str:
    from clip_cid.models.device import resolve_device

    return str(resolve_device(recipe.machine.device))
