"""The command line: read the recipe, call the pipeline, print. No logic of its own, and no torch at import."""

import contextlib
import dataclasses
import functools
import inspect
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from tyro.conf import Positional

from clip_cid import extras, log, open_files, os_errors, pipeline, units
from clip_cid.auto_numbers import as_before
from clip_cid.errors import ClipCidError, ConfigError, RunError
from clip_cid.first_recipe import choose, full_recipe, shipped_recipe, short_recipe
from clip_cid.new_folder import drop_left
from clip_cid.overruling import let_flags_count, settings_given
from clip_cid.recipe import (
    ALLOW_PIPE,
    Config,
    Recipe,
    auto_settings,
    commented_recipe,
    one_line,
    parse_recipe,
    read_recipe,
    read_run_recipe,
)
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, DRAW, EMBED, EVALUATE, REPORT, TEXTS
from clip_cid.stages.facts import Stage
from clip_cid.tasks import torchrun_place
from clip_cid.training.so_far import TrainingSoFar

# No line begins with a sign or a digit: tyro would break the paragraph there.
_ABOUT = """Distil a huge CLIP into a small one on your own image-text data.

pairs -> embed -> balance -> cluster -> distill -> evaluate -> draw -> report.

All stages run with `clip-cid run RUN --recipe FILE`; nothing that is up to date is repeated. Each stage
is also a command of its own. Start with `clip-cid init --pairs N` (a recipe that fits your data) or
with `clip-cid sample` (pairs to try it with).

The help of a stage lists its own settings and those of `machine` that concern it; other settings of
`machine` are taken too, for the stages to come. `clip-cid run --help` lists all.

A flag overrules the recipe. A list is replaced as a whole. Of settings with names (evaluate.sets and
others), entries are added, those of the same name are replaced, and the flag alone removes all.

Add --debug to see the traceback of an error; --version alone tells the version. The exit code is 0 for success, 1 for bad data or state,
and 2 for a bad setting."""

_STAGE_HELP = {
    "check": "Try the first steps of a training and discard them: shows mistakes, memory, FLOPs, disk and hours.",
    "run": "Run every stage that is missing or stale, in order, and say why.",
    EMBED: "Compute the teacher's image and text embeddings once and store them.",
    BALANCE: "Keep one image of each set of near-duplicates (image semantic balance, paper 3.1).",
    CLUSTER: "Spherical k-means over the kept images (paper 3.2, Eq. 1).",
    TEXTS: "Compute the teacher's embeddings of distill.texts, which need no images.",
    DISTILL: "Train the student from the stored embeddings, into a folder that open_clip loads.",
    EVALUATE: "Zero-shot, linear probe, neighbors and retrieval of the student and of other models beside it.",
    DRAW: "Draw the figures, from the files of the run.",
    REPORT: "Write one self-contained HTML page about the run.",
}


_Seen = TypeVar("_Seen")
Run = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
Out = Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
File = Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]

_FOLDER = "The run folder; created when it does not exist."
_UNTOUCHED = "The run folder. It need not exist, and nothing in it changes."
_COMMON: tuple[tuple[str, Any, str], ...] = (
    ("recipe", Path | None, "A recipe file. Default: the one stored in the run folder, else the default settings."),
    (
        "allow_pipe",
        bool,
        f"Let a source `pipe:COMMAND` of the recipe run its shell command. The same as {ALLOW_PIPE}=1 in the environment.",
    ),
    (
        "embeddings",
        Path | None,
        "Use these embeddings instead of running embed: a store of ours, a clip-retrieval folder (texts and "
        "metadata are optional), DataComp's .npz shards, a folder of .npy files, or one .npy.",
    ),
    ("kept", Path | None, "Use this .npy of kept rows instead of running balance."),
    ("clusters", Path | None, "Use this folder with centers.npy and labels.npy instead of running cluster."),
    ("ray", str | None, "Same as --machine.ray: the address of a Ray cluster that does the tasks, or auto."),
)
_FORCE: tuple[tuple[str, Any, str], ...] = (("force", bool, "Run even if the results are up to date."),)
_OF_RUN: tuple[tuple[str, Any, str], ...] = (
    (
        "until",
        Literal["embed", "balance", "cluster", "texts", "distill", "evaluate", "draw"] | None,
        "Run the stages up to this one only: `--until balance` ends with the page of the balance.",
    ),
)
_OF_BALANCE: tuple[tuple[str, Any, str], ...] = (
    (
        "sweep",
        bool,
        "Afterwards, print and draw the share of the images that each threshold up to balance.max-threshold removes.",
    ),
    (
        "suggest",
        bool,
        "Afterwards, look at pairs of all distances up to balance.max-threshold, say where repeats end, and write"
        " suggest.html with pairs to look at.",
    ),
    (
        "threshold",
        float | None,
        "Same as --balance.threshold: the distance at or below which images join one set. It ends a --target-removed of"
        " before.",
    ),
    ("target_removed", float | None, "Same as --balance.target-removed: take the threshold that removes this share."),
)
_OF_EVALUATE: tuple[tuple[str, Any, str], ...] = (
    (
        "model",
        tuple[str, ...],
        "One or more models to evaluate too: an open_clip name (with --pretrained) or NAME/TAG, local-dir:PATH, "
        "hf-hub:ORG/NAME, run:PATH. In a folder that is not a run yet, only these are evaluated.",
    ),
    ("pretrained", str | None, "The open_clip tag of each --model that is a plain name."),
)
_OF_REPORT: tuple[tuple[str, Any, str], ...] = (
    (
        "blur",
        bool,
        "Same as --report.blur: blur every picture of the data until the pointer is on it or it is clicked.",
    ),
    ("no_images", bool, "Same as --report.no-images: numbers only, no picture, caption or key of the data."),
    (
        "watch",
        bool,
        "Only the page of the training, training.html: write it every 10 seconds until the training ends, or until"
        " Ctrl-C. The page in the browser loads itself again.",
    ),
)
_EXTRAS = {
    "check": (),
    "run": (*_FORCE, *_OF_RUN),
    BALANCE: (*_FORCE, *_OF_BALANCE),
    EVALUATE: (*_FORCE, *_OF_EVALUATE),
    REPORT: (*_FORCE, *_OF_REPORT),
}
_SHORT = {
    "embeddings": "embed.existing",
    "kept": "balance.existing",
    "clusters": "cluster.existing",
    "threshold": "balance.threshold",
    "target_removed": "balance.target_removed",
    "ray": "machine.ray",
    "blur": "report.blur",
    "no_images": "report.images",
}
"""Flags that are short for settings."""

_LONGEST_ARGUMENT = 8_192
_MOST_CHARACTERS = 10_000  # of an error
_STATUS_SECONDS = 2.0  # between two looks of `status --watch`


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # Threads that spin while they wait take cores from others: a busy machine becomes several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = _with_precision([argument for argument in arguments if argument != "--debug"])
    if arguments == ["--version"]:
        log.say(f"clip-cid {metadata.version('clip-cid')}")
        return 0

    open_files.raise_limit()
    log.setup(quiet=torchrun_place().rank > 0)
    try:
        _refuse_long(arguments)
        done = tyro.extras.subcommand_cli_from_dict(
            _commands(arguments), prog="clip-cid", description=_ABOUT, args=arguments, sort_subcommands=False
        )
        return done if isinstance(done, int) else done.start()
    except ClipCidError as error:
        return _fail(f"{error.problem}\n{error.fix}", error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("stopped.\nRun the same command again to resume; finished work is kept.", 130, debug)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 1
        problem = os_errors.explain(error)
        if problem is None:
            raise
        return _fail(f"{problem.problem}\n{problem.fix}", problem.exit_code, debug)


def _reader_has_left() -> bool:
    """Whether the output goes into a pipe that nobody reads any more, as after `| head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest goes nowhere, without a word
    return True


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"clip-cid: {log.printable(units.shortened(message, _MOST_CHARACTERS))}\n")
    return code


def _commands(arguments: Sequence[str] = ()) -> dict[str, Callable[..., Any]]:
    _refuse_repeated(arguments)
    sections, given = tuple(Recipe.model_fields), settings_given(arguments, Recipe().model_dump(), _SHORT)

    commands = {
        "run": _recipe_command("run", sections, given, _run),
        "check": _recipe_command("check", sections, given, _check),
    }
    helps = bool({"-h", "--help"} & {*arguments})
    for stage in pipeline.STAGES:
        shown = stage if helps else None
        commands[stage.name] = _recipe_command(stage.name, (*stage.sections, "machine"), given, _run, shown)

    return commands | {
        "status": status,
        "verify": verify,
        "subset": subset,
        "review": review,
        "join": join,
        "ablate": ablate,
        "compare": compare,
        "sets": sets,
        "export": export,
        "push": push,
        "init": init,
        "plan": plan,
        "sample": sample,
    }


def _with_precision(arguments: Sequence[str]) -> list[str]:
    """`--onnx` without a precision means float32, as it did when there was no other."""
    known = get_args(get_args(inspect.signature(export).parameters["onnx"].annotation)[0])
    spelled: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        spelled += [argument, known[0]] if argument == "--onnx" and following not in known else [argument]
    return spelled


def _refuse_long(arguments: Sequence[str]) -> None:
    """Refuse what is no name, number or pattern, before the parser prints all of it."""
    for argument in arguments:
        if len(argument) > _LONGEST_ARGUMENT:
            raise ConfigError(
                f"An argument of more than {_LONGEST_ARGUMENT:,} characters: {units.shortened(argument, 100)}",
                fix="Put long values into a recipe: --recipe FILE.",
            )


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Refuse a flag with several values that is given twice: only the last would count."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for name in ("model", "values", *_with_several_values(Recipe())):
        flag = f"--{name.replace('_', '-')}"
        if flags.count(flag) > 1:
            raise ConfigError(
                f"{flag} is given {flags.count(flag)} times, and only the last would count.",
                fix=f"Give all values after one {flag}; a second command can add more entries with names.",
            )


def _with_several_values(section: Config, prefix: str = "") -> Generator[str]:
    """The names of the settings that take several values."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Config):
            yield from _with_several_values(value, f"{prefix}{name}.")
        elif isinstance(value, tuple | dict):
            yield prefix + name


def _recipe_command(
    name: str,
    sections: Sequence[str],
    given: Sequence[str],
    act: Callable[[str, Any, Recipe], None],
    shown: Stage | None = None,
) -> Callable[..., Any]:
    """A command with the common flags and one for each setting of `sections`, as a class that tyro reads.

    For the help of a stage: only with those that concern it. The others are taken too, for the stages to come.
    """
    folder = tyro.conf.arg(metavar="RUN", help=_UNTOUCHED if name == "check" else _FOLDER)
    fields: list[Any] = [("run", Annotated[Positional[Path], folder])]
    for flag, kind, text in (*_COMMON, *_EXTRAS.get(name, _FORCE)):
        replaces = _SHORT.get(flag, "").removesuffix(".existing")
        if shown is not None and replaces in pipeline.BY_NAME and replaces not in (name, *shown.needs):
            continue
        if shown is not None and "." in replaces and not shown.concerns(replaces):
            continue
        value = {bool: False, tuple[str, ...]: ()}.get(kind)
        kind = Annotated[kind, tyro.conf.arg(help=text), tyro.conf.FlagCreatePairsOff]  # no --no-force
        fields.append((flag, kind, dataclasses.field(default=value)))
    fields += [_field(section, _flags(section, shown)) for section in sections]

    def start(flags: Any) -> int:
        os_errors.refuse_address(flags.run)
        only = None if name == "run" else name
        with contextlib.nullcontext() if name == "check" else pipeline.joint_ranks(only) as ranks:
            wanted = over(_recipe(flags, ranks), flags)
            with _pipes(flags.allow_pipe):
                act(name, flags, wanted)
        return 0

    def over(recipe: Recipe | None, flags: Any) -> Recipe:
        """The recipe with what the flags say."""
        settings = (recipe or Recipe()).model_dump()
        for section in sections:
            _lay_over(settings[section], getattr(flags, section), section, given)

        # Flags that are short for settings.
        for flag, setting in _SHORT.items():
            value = getattr(flags, flag, None)
            if value is not None and value is not False:
                section, _, last = setting.partition(".")
                settings[section][last] = value if flag != "no_images" else False

        # A flag counts, whatever the recipe remembers.
        for cleared in let_flags_count(settings, given):
            log.warn(cleared)

        # Models to measure; a folder that is not a run has no student.
        if models := _models(getattr(flags, "model", ()), getattr(flags, "pretrained", None)):
            settings["evaluate"]["compare"] |= models
            if recipe is None:
                settings["evaluate"]["student"] = False

        wanted = parse_recipe(settings, where="settings")
        for stage in dict.fromkeys(setting.partition(".")[0] for setting in given):
            if stage in sections and stage in _STAGE_HELP and not wanted.uses(stage):
                log.warn(f"--{stage}...: this recipe does not use {stage}, so its settings have no effect")
        return wanted

    command = dataclasses.make_dataclass(name, fields, namespace={"start": start})
    command.__doc__ = _STAGE_HELP[name]
    return command


def _recipe(flags: Any, ranks: Any) -> Recipe | None:
    """The recipe that a command names, or that of its run; of several processes only the main one looks into the run."""
    recipe = None if flags.recipe is None else read_recipe(flags.recipe)
    if ranks is None or ranks.is_main:
        recipe = _stored_recipe(flags.run) if recipe is None else _with_defaults_of_run(recipe, flags.run)
    of_main = recipe if ranks is None else ranks.from_main(recipe)
    return recipe or of_main


def _stored_recipe(run: Path) -> Recipe | None:
    """The recipe of a run; None where no run has begun."""
    path = run / pipeline.RECIPE_FILE
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return read_run_recipe(path)


def _with_defaults_of_run(recipe: Recipe, run: Path) -> Recipe:
    """A recipe of a run that was made before there was `auto`, with the defaults of then."""
    try:
        stored = _stored_recipe(run) if auto_settings(recipe) else None
    except ConfigError:
        return recipe  # which takes the place of the damaged one
    if stored is None:
        return recipe
    recipe, kept = as_before(recipe, stored)
    if kept:
        log.info(
            f"{', '.join(kept)}: as when this run was begun, where the recipe now says auto; give numbers to change"
        )
    return recipe


def _lay_over(settings: dict[str, Any], flags: Any, section: str, given: Sequence[str]) -> None:
    """Put the flags that are given over the settings of a recipe. Entries with names join those it has."""
    for field in dataclasses.fields(flags):
        value, name = getattr(flags, field.name), f"{section}.{field.name}"
        if dataclasses.is_dataclass(value):
            _lay_over(settings[field.name], value, name, given)
        elif name in given:
            settings[field.name] = settings[field.name] | value if value and isinstance(value, dict) else value


@contextlib.contextmanager
def _pipes(allowed: bool) -> Generator[None]:
    """Inside, `pipe:` is allowed to this process and to those it starts, if `allowed` or if it was before."""
    before = os.environ.get(ALLOW_PIPE)
    if allowed:
        os.environ[ALLOW_PIPE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ALLOW_PIPE, None)
        else:
            os.environ[ALLOW_PIPE] = before


def _models(names: Sequence[str], tag: str | None) -> dict[str, str]:
    """What --model and --pretrained name, as entries of evaluate.compare."""
    plain = [name for name in names if ":" not in name and "/" not in name]
    if tag is None and plain:
        raise ConfigError(
            f"--model: {plain[0]} is an architecture without weights.",
            fix="Add --pretrained TAG, or give NAME/TAG, local-dir:PATH, hf-hub:ORG/NAME or run:PATH.",
        )
    if tag is not None and not plain:
        raise ConfigError(
            f"--pretrained: {tag} belongs to no --model that is a plain name.",
            fix="Give --model NAME, such as ViT-B-32.",
        )
    references = [f"{name}/{tag}" if name in plain else name for name in names]
    return {reference: reference for reference in references}


def _run(name: str, flags: Any, recipe: Recipe) -> None:
    for flag in ("sweep", "suggest"):
        if getattr(flags, flag, False):
            extras.require(f"--{flag}", extras.REPORT)
    if name == REPORT and _show_training(flags, recipe):
        return
    only, until = None if name == "run" else name, getattr(flags, "until", None)
    pipeline.run(RunFolder(flags.run), recipe, only=only, until=until, force=flags.force)
    if getattr(flags, "sweep", False):
        from clip_cid.report.sweep import sweep

        log.table(*sweep(RunFolder(flags.run)))
    if getattr(flags, "suggest", False):
        from clip_cid.report import suggestion

        found = suggestion.suggest(RunFolder(flags.run), recipe)
        log.table(*found.table())
        log.say("\n".join([*found.sentences, f"The pairs are in {flags.run / suggestion.PAGE}."]))


def _show_training(flags: Any, recipe: Recipe) -> bool:
    """Write the page of an unfinished training; returns whether there is nothing else to report now."""
    folder = RunFolder(flags.run)
    if flags.watch:
        extras.require("report --watch", extras.DISTILL, extras.REPORT)
        with contextlib.suppress(KeyboardInterrupt):
            return pipeline.show_training(folder, recipe, watch=True)
        return True
    if not flags.run.is_dir() or any(map(extras.absent, (extras.DISTILL, extras.REPORT))):
        return False  # which is refused with its reason
    return pipeline.show_training(folder, recipe)


def _check(_: str, flags: Any, recipe: Recipe) -> None:
    extras.require("check", extras.DISTILL)
    from clip_cid.check import check, printout

    printout.say(check(RunFolder(flags.run), recipe))


@functools.cache
def _flags(name: str, shown: Stage | None) -> type[Any]:
    """A section as a plain class. It has no limits: `parse_recipe` says what is wrong with a value.

    Args:
        name: Of the section, or of a part of one.
        shown: Leave out what does not concern this stage.
    """
    section: Config = functools.reduce(getattr, name.split("."), Recipe())
    fields: list[tuple[str, Any, Any]] = []
    for setting, field in type(section).model_fields.items():
        value, full = getattr(section, setting), f"{name}.{setting}"
        if shown is not None and not shown.concerns(full):
            continue
        if isinstance(value, Config):
            fields.append(_field(setting, _flags(full, None)))
        else:
            kind = Annotated[field.annotation, tyro.conf.arg(help=one_line(field.description))]
            fields.append((setting, kind, dataclasses.field(default_factory=lambda value=value: value)))
    flags = dataclasses.make_dataclass(type(section).__name__, fields)
    flags.__doc__ = type(section).__doc__
    return flags


def _field(name: str, kind: type[Any]) -> tuple[str, Any, Any]:
    return (name, kind, dataclasses.field(default_factory=kind))


def status(run: Run, recipe: Path | None = None, watch: bool = False) -> int:
    """Show the state of each stage of a run, and why.

    Args:
        run: The run folder.
        recipe: Compare with this recipe instead of the one stored in the run.
        watch: Keep it up to date until Ctrl-C; without a terminal, print a line for each change.
    """
    folder = _existing(run)
    columns = ("stage", "status", "reason", "made", "result")
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            log.live_table(columns, _watched(lambda: _table_of_states(RunFolder(run), recipe)))
        return 0

    title, rows = _table_of_states(folder, recipe)
    log.table(columns, rows, title=title)
    if asides := [str(aside) for stage in pipeline.STAGES for aside in folder.asides(stage.name)]:
        log.say(f"Of other settings, which bring it back: {', '.join(asides)}. Delete what you do not need.")
    return 0


def _table_of_states(folder: RunFolder, recipe: Path | None) -> tuple[str, list[list[str]]]:
    """Title and rows of `status`."""
    work = folder.at_work()
    if recipe is None:
        wanted = read_run_recipe(folder.path / pipeline.RECIPE_FILE)
    else:
        wanted = _with_defaults_of_run(read_recipe(recipe), folder.path)

    rows: list[list[str]] = []
    for state in pipeline.states(folder, wanted):
        record, running = state.record, work is not None and work.stage == state.stage.name
        made = f"{record.started}, {units.duration(record.seconds)}" if record else ""
        status, reason = state.status, f"{state.reason}; can resume" if state.resumes else state.reason
        if work is not None and running:
            status, reason = "running", f"since {work.since}"
        result = pipeline.headline(record, folder.path)
        if state.stage.name == DISTILL and (running or state.resumes):
            result = str(TrainingSoFar.unfinished(folder) or result)
        rows.append([state.stage.name, status, reason, made, result])
    return str(folder.path) if work is None else f"{folder.path} (in use by {work.holder})", rows


def _watched(look: Callable[[], _Seen]) -> Generator[_Seen]:
    """What `look` gives, again and again; it takes a tenth of the time at most.

    A look at a folder in the moment in which it is replaced may fail; one that fails twice running is an error.
    """
    failed = False
    while True:
        began = time.monotonic()
        try:
            seen = look()
        except (ClipCidError, OSError):
            if failed:
                raise
            failed = True
        else:
            failed = False
            yield seen
        time.sleep(max(_STATUS_SECONDS, 9 * (time.monotonic() - began)))


def verify(run: Run) -> int:
    """Read every byte of the run's results and compare it with what was written.

    Args:
        run: The run folder.
    """
    problems = pipeline.verify(_existing(run))
    if problems:
        raise RunError(
            f"{run}: {units.counted(len(problems), 'file')} changed since written: {'; '.join(problems[:5])}",
            fix=f"Run the first of these stages again: `clip-cid {problems[0].partition(':')[0]} {run} --force`.",
        )
    return 0


def subset(
    run: Run,
    out: Out,
    shards: bool = False,
    shard_size: int = 10_000,
    per_cluster: int | None = None,
    total: int | None = None,
    levels: tuple[int, ...] = (),
    allow_pipe: bool = False,
) -> int:
    """Write the balanced list of a run: keys, rows, tables, what was removed and why; with --shards also tars.

    keys.txt and keys.parquet have the kept keys, rows.npy the rows of the embeddings. tables/ has the kept
    rows of pairs from a CSV, TSV or Parquet, in the form they came in. removed.parquet has a line for each
    other row: the reason, the distance, and which row was kept for it. When it was killed, the same command resumes it.

    Args:
        run: The run folder; its balance stage must have finished and be up to date.
        out: The folder to create.
        shards: Also write the kept pairs as WebDataset tars. Their files are copied byte for byte from
            pairs.source of the run's recipe.
        shard_size: Pairs in a tar.
        per_cluster: List at most this many images of a cluster, drawn at random: the long tail is kept, the
            head is cut. The run must have clusters.
        total: List this many images, shared evenly by the clusters: one that has fewer than its share gives
            all, and the others share the rest. With --per-cluster no cluster gives more than that.
        levels: Share the total by a hierarchy (Vo et al. 2024): the centers are clustered into this many
            clusters of clusters, these into the next number, and so on, as in `--levels 1000 100`. The total
            is shared evenly by the last ones, each share by the clusters within, down to the images. So a
            theme that fills many clusters gives no more than one that fills few.
        allow_pipe: Let a source `pipe:COMMAND` of the recipe run its shell command.
    """
    os_errors.refuse_address(out)
    from clip_cid.publish.subset import ClusterDraw, export_subset

    draw = ClusterDraw(per_cluster, total, levels)
    folder = _existing(run)
    recipe = read_run_recipe(run / pipeline.RECIPE_FILE)
    with _pipes(allow_pipe), os_errors.explained(out, kept="Finished tars are kept."):
        pipeline.require_current(folder, recipe, CLUSTER if draw.reads_clusters else BALANCE)
        said = export_subset(folder, recipe, out, shard_size=shard_size if shards else None, draw=draw)
    log.say(said)
    return 0


def review(
    run: Run, decisions: Path | None = None, port: int = 0, export: Path | None = None, allow_pipe: bool = False
) -> int:
    """Show the sets of a balance on a page of this machine, where a person decides; or write them out with --export.

    Every decision is saved at once; `clip-cid balance RUN --balance.decisions FILE` obeys them. Needs
    `pip install "clip-cid[review]"`, but for --export.

    Args:
        run: The run folder; its balance stage must have finished.
        decisions: The file of decisions, created with the first one. Default: balance.decisions of the run's
            recipe, else decisions.jsonl in the run folder.
        port: The port of the page, on this machine only. Default: one that is free.
        export: Write members.parquet and members.csv into this new folder instead, for FiftyOne, LightlyStudio
            or a spreadsheet.
        allow_pipe: Let a source `pipe:COMMAND` of the recipe run its shell command.
    """
    if export is None:
        extras.require("review", extras.REVIEW)
    from clip_cid.review.opened_run import OpenedRun

    folder = _existing(run)
    with _pipes(allow_pipe):
        opened = OpenedRun(folder, read_run_recipe(run / pipeline.RECIPE_FILE), decisions)
        if export is not None:
            from clip_cid.review.hand_over import write_members

            os_errors.refuse_address(export)
            with os_errors.explained(export):
                log.say(write_members(opened, export))
            return 0
        from clip_cid.review.serve import serve

        serve(opened, port=port)
    return 0


def join(stores: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="STORE ...")], out: Out) -> int:
    """Join the embeddings of several teachers by key into one store, in which each teacher weighs equally.

    Its rows are the teachers' rows side by side, each turned so that its variance is even, and scaled.
    A cosine is then a weighted mean of the teachers' cosines. Use it with --embeddings OUT. When it was
    killed, the same command resumes it.

    Args:
        stores: Embedding stores, or runs whose embed stage has finished.
        out: The folder to create.
    """
    os_errors.refuse_address(out)
    from clip_cid.joining import join_teachers

    with os_errors.explained(out, kept="Finished shards are kept."):
        join_teachers(stores, out)
    return 0


def ablate(
    table: Positional[Literal["threshold", "losses", "clusters", "teacher"]],
    recipe: File,
    out: Out,
    seeds: int = 3,
    values: tuple[str, ...] = (),
    peers: bool = False,
    dry_run: bool = False,
    allow_pipe: bool = False,
) -> int:
    """Vary one setting of a recipe, as the paper's Tables 4 to 7 do, with several seeds: one table with intervals.

    Stages that are equal in several runs are computed once. When it was killed, the same command resumes it.

    Args:
        table: What to vary: threshold (of the balance), losses, clusters (their number), or teacher.
        recipe: A recipe file: the settings that all runs share.
        out: The folder of the runs and of ablation.md, .csv, .json and .svg.
        seeds: Runs of each variant, with distill.seed 0, 1, ... Use at least three for a useful interval.
        values: Thresholds, numbers of clusters, or teachers (run:PATH, local-dir:PATH, hf-hub:ORG/NAME,
            NAME/TAG, or an embedding store such as `clip-cid join` makes). Default: the paper's, scaled to
            the recipe.
        peers: Also train with the losses of peers (for losses only).
        dry_run: Only print what would be run.
        allow_pipe: Let a source `pipe:COMMAND` of the recipe run its shell command.
    """
    os_errors.refuse_address(out)
    extras.require("ablate", extras.DISTILL, extras.REPORT)
    from clip_cid.ablations import runs, variants

    page = read_recipe(recipe)
    plan = variants.plan(table, page, values=values, peers=peers)
    start = runs.preview if dry_run else runs.run
    with _pipes(allow_pipe), os_errors.explained(out, kept="Finished runs are kept."):
        start(plan, page, out, seeds=seeds)
    return 0


def compare(
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")],
    out: Path = Path("comparison"),
    common: bool = False,
) -> int:
    """Compare the models of several runs on one page: scores with paired intervals, cost, training curves.

    The first model is the one that all others are compared with. Nothing is measured again. Intervals are paired
    where the records show that the images are the same.

    Args:
        runs: Run folders, or folders that `clip-cid evaluate --model` made; their evaluations must have finished.
        out: The folder of compare.html, compare.csv and compare.json.
        common: Leave out the sets that some of them lack, and list them. Without it they are refused.
    """
    os_errors.refuse_address(out)
    extras.require("compare", extras.EVALUATE, extras.REPORT)
    from clip_cid.report.comparison.page import compare as write

    with os_errors.explained(out):
        log.say(write(runs, out, common=common))
    return 0


def sets(group: Positional[Literal["clip", "datacomp"]] = "clip") -> int:
    """List the evaluation sets that have names: CLIP's with the shifted ImageNets, or DataComp's 38.

    Args:
        group: Which list. Of DataComp's it says how each is measured here, and what is missing.
    """
    from clip_cid.data.sets.groups import table_of

    log.table(*table_of(group))
    return 0


def export(
    run: Run,
    out: Out,
    onnx: Literal["fp32", "fp16", "int8"] | None = None,
    max_drop: float | None = None,
    transformers: bool = False,
) -> int:
    """Copy the trained student to a folder that open_clip, CLIP_benchmark and the Hugging Face Hub load.

    Args:
        run: The run folder; its distill stage must have finished.
        out: The folder to create.
        onnx: Also write both towers as ONNX graphs. --onnx alone means fp32: each is compared with PyTorch.
            fp16 and int8 are measured on the evaluation sets of the run, beside the student. Needs
            `pip install "clip-cid[onnx]"`.
        max_drop: Points that a score of fp16 or int8 may drop by; with more, nothing is written. Default: 1.
        transformers: Also write a folder for CLIPModel or SiglipModel of transformers, with processor and
            tokenizer, and compare it with open_clip. Needs `pip install "clip-cid[transformers]"`.
    """
    os_errors.refuse_address(out)
    folder = _existing(run)
    extras.require("export", extras.DISTILL)
    folder.stage(DISTILL)  # refused before the libraries are loaded
    from clip_cid.publish.export_folder import export_folder
    from clip_cid.publish.onnx_precision import ALLOWED

    if max_drop is not None and (onnx in (None, "fp32") or not 0 <= max_drop <= 100):
        raise ConfigError(
            f"--max-drop {max_drop:g}: is the number of points that --onnx fp16 or int8 may lose, from 0 to 100.",
            fix="Give it with one of them.",
        )
    less = None if onnx == "fp32" else onnx
    said = export_folder(
        folder,
        out,
        Recipe() if less is None else read_run_recipe(run / pipeline.RECIPE_FILE),
        exact_onnx=onnx == "fp32",
        less=less,
        allowed=ALLOWED if max_drop is None else max_drop,
        hf=transformers,
    )
    log.say(said)
    return 0


def push(
    run: Run,
    repo: Annotated[Positional[str], tyro.conf.arg(metavar="ORG/NAME")],
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> int:
    """Upload the trained student to the Hugging Face Hub, with a model card filled from the run.

    First the student is reloaded and compared, and paths in its provenance are cut to their names. Log in
    with `hf auth login` before, or set HF_TOKEN.

    Args:
        run: The run folder; its distill stage must have finished.
        repo: The repository on the Hub; created when it does not exist.
        license: The license of the model, as the Hub names it (apache-2.0, cc-by-nc-4.0, ...). Without it
            the model card names none.
        private: Make the repository private.
        dry_run: Print the model card and upload nothing. Needs neither network nor token.
    """
    folder = _existing(run)
    extras.require("push", extras.DISTILL)
    from clip_cid.publish.hub import card_of, push_student

    if dry_run:
        log.say(card_of(folder, repo, license=license))
    else:
        log.say(push_student(folder, repo, license=license, private=private))
    return 0


def init(
    file: File = Path("recipe.yaml"),
    pairs: int | None = None,
    gpus: int | None = None,
    all: bool = False,
    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="NAME")] = None,
) -> int:
    """Write a recipe: with --pairs a short one whose numbers fit, each with its reason; else every setting.

    Args:
        file: The recipe to write; it must not exist yet.
        pairs: How many pairs there are, roughly. Numbers of clusters, batch, epochs and warm-up follow.
        gpus: GPUs to train on. Default: none, so the CPU.
        all: Write every setting with its limits and its explanation, also with --pairs.
        from_: Write one of the recipes that come with clip-cid, as it is: small-gpu (a million pairs and one GPU),
            demo, mixed, laion400m-b32 (the paper's) and others. An unknown name lists them all.
    """
    os_errors.refuse_address(file)
    if file.exists():
        raise ConfigError(f"{file}: exists already.", fix="Give another name, or delete it first.")
    if from_ is not None and (pairs is not None or gpus is not None or all):
        raise ConfigError(
            "--from: such a recipe is written as it is.", fix="Leave out --pairs, --gpus and --all, or --from."
        )
    if pairs is None and gpus is not None:
        raise ConfigError("--gpus: what fits depends on the number of pairs, too.", fix="Add --pairs N.")
    chosen = [] if pairs is None else choose(pairs, gpus or 0)
    if from_ is not None:
        text = shipped_recipe(from_)
    else:
        text = commented_recipe() if pairs is None else (full_recipe if all else short_recipe)(pairs, gpus or 0)

    file.parent.mkdir(parents=True, exist_ok=True)
    drop_left(file)
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if chosen:
        log.table(("setting", "value", "why"), [(one.setting, f"{one.value}", one.why) for one in chosen])
    log.say(f"Wrote {file}; set pairs.source in it, then: clip-cid run runs/{file.stem} --recipe {file}")
    return 0


def plan(run: Run, pairs: float, gpus: int = 1, price: float | None = None, recipe: Path | None = None) -> int:
    """Estimate a run of N pairs on G GPUs: GPU hours, hours, tasks, disk, bytes read, memory, money.

    It measures for about a minute on this machine, and reads some pairs and embeddings of the run. Nothing in
    the run changes. The exit code is 1 if something does not fit, with the setting that would.

    Args:
        run: A run folder with some of the same data, for rates and rows. It need not have begun.
        pairs: How many pairs there will be, such as 400e6.
        gpus: GPUs like the one here that share the work; without one here, CPUs like this one.
        price: Of one of them for an hour.
        recipe: The recipe of the large run. Default: the one stored in the run folder, else the default settings.
    """
    os_errors.refuse_address(run)
    extras.require("plan", extras.DISTILL)
    from clip_cid.plan import plan as estimate
    from clip_cid.plan import printout, refusal

    wanted = (None if recipe is None else read_recipe(recipe)) or _stored_recipe(run) or Recipe()
    forecast = estimate(RunFolder(run), wanted, pairs=pairs, gpus=gpus, price=price)
    printout.say(forecast)
    if forecast.misfits:
        raise refusal(forecast.misfits)
    return 0


def sample(out: Out, pairs: int = 6000, seed: int = 0) -> int:
    """Write a small sample: captioned scenes with planted duplicates, and labelled sets to evaluate on.

    Args:
        out: The folder to create.
        pairs: Number of training pairs.
        seed: Seed of the scenes.
    """
    os_errors.refuse_address(out)
    from clip_cid.data.sample.write import FEWEST_PAIRS, write_sample

    if pairs < FEWEST_PAIRS:
        raise ConfigError(
            f"--pairs: must be at least {FEWEST_PAIRS}, got {pairs}.", fix=f"Give {FEWEST_PAIRS} or more."
        )
    with os_errors.explained(out):
        summary = write_sample(out, pairs=pairs, seed=seed)
    log.say(f"{out}: {summary}")
    return 0


def _existing(run: Path) -> RunFolder:
    folder = RunFolder(run)
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder.", fix=f"`clip-cid run {run} --recipe FILE` makes one.")
    return folder
