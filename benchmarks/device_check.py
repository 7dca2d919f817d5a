"""Whether clip-cid does on a CUDA device what it does on the CPU, and how fast: one verdict a line.

    make device-check                                            unattended, eight minutes at most
    python benchmarks/device_check.py --only embed balance       some lines alone
    python benchmarks/device_check.py --device cpu --tiny        every line on small data: that the check itself works

The lines and their bars are in `device_check_lines.py`; `--only` takes their names. Each line is a process of its own
with a time limit: a crash, a lack of memory or a hang of one loses no other. Results are written after each line, to
`device_check.json` and `device_check.md` in --out (default runs/device-check); the table is to be pasted into
docs/results.md. What a line has said is in `logs/` beside them. Results of an earlier check are moved to `earlier-TIME`.

passed: the number meets the bar, and all else that the line asks for holds. failed: it does not, or the line raised an
error or took too long. skipped: it could not be judged, for the reason given; with --tiny these are all bars of speed.
The last word is `passed` only if every line passed, `incomplete` if some were skipped, and `failed` (exit status 1) if
one failed.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from device_check_lines import LINES
from device_check_parts import Line, Outcome, Place, Skipped
from device_check_stages import SAMPLE
from process_costs import machine

from clip_cid.errors import ClipCidError
from clip_cid.models.device import resolve_device

# Loaded once, before the process of a line begins; nothing of them asks for a device.
PRELOADED = [
    "torch",
    "open_clip",
    "clip_cid.cli",
    "clip_cid.pipeline",
    "clip_cid.stages.distill",
    "clip_cid.stages.embed",
]
_SECONDS = 470  # of all lines
_LEAST_SECONDS = 5  # a line is not begun with less
_TINY_LIMIT = 300
_PATIENCE = 20  # seconds for the system to end a process
_JSON, _TABLE, _LOGS = "device_check.json", "device_check.md", "logs"
Verdict = Literal["passed", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to check."""

    device: str = "cuda"
    """cuda, cuda:1 or cpu."""
    tiny: bool = False
    """Small data, on which no speed is judged."""
    only: tuple[str, ...] = ()
    """Names of lines; all when absent. Lines of the sample need `sample`, which runs before them."""
    out: Path = Path("runs/device-check")
    """Results. The lines' own files, some 15 GB, lie in a folder there that is removed at the end."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a line."""

    name: str
    what: str
    bar: str
    verdict: Verdict
    number: str = ""
    reason: str = ""
    """Why it did not pass."""
    notes: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def judge(line: Line, outcome: Outcome, *, tiny: bool) -> tuple[Verdict, str]:
    """The verdict on what a line has measured, and the reason if it did not pass."""
    if broken := [what for what, holds in outcome.holds.items() if not holds]:
        return "failed", "not so: " + "; ".join(broken)
    if not math.isfinite(outcome.number):
        return "failed", "the number is not finite"
    if outcome.not_judged:
        return "skipped", outcome.not_judged
    if line.of_speed and tiny:
        return "skipped", "small data say nothing of speed; all else that the line asks for holds"
    if not line.bar.is_met_by(outcome.number):
        return "failed", f"{line.bar.shown(outcome.number)} is not {line.bar}"
    return "passed", ""


def run(line: Line, place: Place, logs: Path, limit: float) -> Result:
    """The line in a process of its own, for so many seconds at most."""
    left = place.work / f"{line.name}.json"
    left.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_work, args=(line, place, left, logs / f"{line.name}.txt"))
    began = time.monotonic()
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        _end_all_of(process)
    seconds = time.monotonic() - began

    verdict: Verdict = "failed"
    outcome, reason = Outcome(math.nan), f"stopped after its limit of {limit:.0f} s"
    if not late:
        reason = f"its process ended by itself, exit code {process.exitcode}"
    if not late and left.exists():
        found = json.loads(left.read_text())
        verdict, reason = found["verdict"], found["reason"]
        outcome = Outcome(**found["outcome"])
        if verdict == "passed":
            verdict, reason = judge(line, outcome, tiny=place.tiny)
    number = line.bar.shown(outcome.number) if math.isfinite(outcome.number) else ""
    holds = "; ".join(what for what, so in outcome.holds.items() if so)
    return Result(
        line.name, line.what, f"{line.bar}", verdict, number, reason, "; ".join(filter(None, [outcome.notes, holds])),
        round(seconds, 1), outcome.details,
    )  # fmt: skip


def _work(line: Line, place: Place, left: Path, log: Path) -> None:
    """In the process: what the line has measured, or why it could not."""
    os.setsid()  # so that what it starts can be ended with it
    with log.open("wb") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    if (device := place.torch_device).index is not None:
        torch.cuda.set_device(device)
    outcome, verdict, reason = Outcome(math.nan), "passed", ""
    try:
        outcome = line.measure(place)
    except Skipped as skipped:
        verdict, reason = "skipped", str(skipped)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        verdict, reason = "failed", f"{type(error).__name__}: {text[:300]}"
    part = left.with_suffix(".part")
    part.write_text(json.dumps({"verdict": verdict, "reason": reason, "outcome": dataclasses.asdict(outcome)}))
    part.replace(left)


def _end_all_of(process: Any) -> None:
    """A line, if it still runs, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have a group of its own yet
    process.join(_PATIENCE)


def verdict_on_all(results: Sequence[Result]) -> str:
    """One word: `passed` only if every line passed."""
    verdicts = {result.verdict for result in results}
    if "failed" in verdicts or not results:
        return "failed"
    return "incomplete" if "skipped" in verdicts or len(results) < len(LINES) else "passed"


def table(results: Sequence[Result], about: dict[str, Any]) -> str:
    """In Markdown, for docs/results.md."""
    rows = [
        f"{about['device_name']}, torch {about['versions'].get('torch')}, {about['date'][:10]}"
        f" (`benchmarks/device_check.py`{', small data' if about['tiny'] else ''}):"
        f" **{verdict_on_all(results)}**\n",
        "| line | number | bar | verdict | s |\n|---|---|---|---|---|",
    ]
    for result in results:
        said = "; ".join(filter(None, [result.reason, result.notes])).replace("|", "/")
        verdict = f"**{result.verdict}**" + (f": {said}" if said else "")
        rows.append(f"| {result.what} | {result.number} | {result.bar} | {verdict} | {result.seconds:.0f} |")
    return "\n".join(rows) + "\n"


def main(options: Options) -> int:
    """Run the lines; returns the exit status."""
    known = [line.name for line in LINES]
    if unknown := set(options.only) - set(known):
        print(f"No line is named {', '.join(sorted(unknown))}. They are: {', '.join(known)}.", file=sys.stderr)
        return 2
    try:
        device = resolve_device(options.device)
    except ClipCidError as error:
        print(f"{error}\nNothing was checked; --device cpu --tiny tries the check itself.", file=sys.stderr)
        return 1

    _set_aside_earlier(options.out)
    logs = options.out / _LOGS
    logs.mkdir(parents=True)
    place = Place(options.device, options.tiny, Path(tempfile.mkdtemp(prefix="work-", dir=options.out)).absolute())
    about = machine() | {"device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
    about["tiny"] = options.tiny
    results: list[Result] = []
    _write(results, about, options.out)
    end = time.monotonic() + _SECONDS
    try:
        for line in LINES:
            limit = _TINY_LIMIT if options.tiny else min(line.limit, end - time.monotonic())
            if not _is_asked_for(line, options):
                results.append(_left_out(line, "not asked for"))
            elif limit < _LEAST_SECONDS:
                results.append(_left_out(line, f"the {_SECONDS} s of the whole check are over"))
            else:
                results.append(run(line, place, logs.absolute(), limit))
            last = results[-1]
            print(f"{last.verdict:8} {last.name:16} {last.number:>12} ({last.bar})  {last.reason}", flush=True)
            _write(results, about, options.out)
    finally:
        shutil.rmtree(place.work, ignore_errors=True)
    word = verdict_on_all(results)
    print(f"\n{word}: {options.out / _TABLE} has the table, {logs} what each line said")
    return 1 if word == "failed" else 0


def _is_asked_for(line: Line, options: Options) -> bool:
    """Whether `--only` names it, or a line that needs the sample which this one makes."""
    if line.name == SAMPLE:
        return not options.only or any(each.needs_sample for each in LINES if each.name in options.only)
    return not options.only or line.name in options.only


def _left_out(line: Line, reason: str) -> Result:
    return Result(line.name, line.what, f"{line.bar}", "skipped", reason=reason)


def _write(results: Sequence[Result], about: dict[str, Any], out: Path) -> None:
    lines = [dataclasses.asdict(result) for result in results]
    everything = {"verdict": verdict_on_all(results), "machine": about, "lines": lines}
    finite = json.loads(json.dumps(everything), parse_constant=str)  # JSON has no NaN
    for name, text in ((_JSON, json.dumps(finite, indent=1)), (_TABLE, table(results, about))):
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)


def _set_aside_earlier(out: Path) -> None:
    """Move the results of an earlier check away, so that nobody takes them for those of this one, and say what is left."""
    earlier = [path for name in (_JSON, _TABLE, _LOGS) if (path := out / name).exists()]
    if earlier:
        aside = out / f"earlier-{datetime.fromtimestamp(earlier[0].stat().st_mtime):%Y-%m-%d-%H%M%S-%f}"
        aside.mkdir()
        for path in earlier:
            path.replace(aside / path.name)
        print(f"The results of an earlier check are in {aside}.")
    for work in sorted(out.glob("work-*")):
        print(f"{work} is of a check that was killed, or that still runs; remove it if none does.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # after the line that runs is ended, and its files removed
    sys.exit(main(tyro.cli(Options, description=__doc__)))
