"""Messages of the program: progress bars on a terminal, plain lines elsewhere; `run.log` gets the same words."""

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from clip_cid import os_errors
from clip_cid.units import duration


def _plain_console(**options: Any) -> Console:
    """A console that takes every text as it is: brackets and colons in names mean nothing to it."""
    return Console(markup=False, emoji=False, highlight=False, **options)


_console = _plain_console(stderr=True, soft_wrap=True)
_logger = logging.getLogger("clip_cid")
_logger.setLevel(logging.INFO)
_FILE_WIDTH = 500  # of a table in a file or a pipe: wide enough for any
_PLAIN_SECONDS = 10.0  # seconds between two lines, if there is no terminal for a bar
_MOST_SECONDS = 1_000 * 3_600  # that are shown as time left
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would move the cursor, or color what follows


def setup(*, quiet: bool = False) -> None:
    """Send messages to the terminal.

    Only the command line calls this, once: the logging of a program that imports us is left alone.

    Args:
        quiet: Say nothing: for all but the main one of several processes.
    """
    if _logger.handlers:
        return
    _logger.propagate = False
    _logger.setLevel(logging.ERROR if quiet else logging.INFO)
    _logger.addHandler(_Lines())


class _Lines(logging.Handler):
    """Whole lines to whatever standard error is at that moment: cut to the terminal, commands could not be pasted."""

    def emit(self, record: logging.LogRecord) -> None:
        _console.print(Text(self.format(record)), soft_wrap=True)


class _LogFile(logging.FileHandler):
    """A log file that is no reason to stop: when it cannot be written, the terminal says so once."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            warn(f"{self.baseFilename}: cannot be written ({sys.exception()}); messages go to the terminal only")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still in the buffer was reported above
            super().close()


@contextlib.contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Also write every message, with its time, to `path`."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _logger.addHandler(handler)
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def quiet(answers: Path) -> Iterator[None]:
    """Show only the warnings inside; answers go into a file instead of standard output."""
    shown = [handler for handler in _logger.handlers if isinstance(handler, _Lines)]
    before = [handler.level for handler in shown]
    for handler in shown:
        handler.setLevel(logging.WARNING)
    try:
        with open(answers, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            yield
    finally:
        for handler, level in zip(shown, before, strict=True):
            handler.setLevel(level)


def printable(text: str) -> str:
    """A text with control characters and bytes that are no text written out, as names of files may hold them."""
    readable = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda control: f"\\x{ord(control[0]):02x}", readable)


def info(message: str) -> None:
    _logger.info(printable(message))


def warn(message: str) -> None:
    _logger.warning("warning: %s", printable(message))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a result of a command to standard output, so that it can be piped."""
    out = _plain_console()
    if not out.is_terminal:
        out = _plain_console(width=_FILE_WIDTH)
    with _standard_output():
        out.print(_grid(columns, rows, title))


def live_table(columns: Sequence[str], states: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> None:
    """Show a table that changes, to standard output: in its place on a terminal, elsewhere a line for each new row.

    Args:
        columns: Its head.
        states: Title and rows, each time they are to be shown. Whoever gives them decides how long to wait.
    """
    out = _plain_console()
    if not out.is_terminal:
        out = _plain_console(width=_FILE_WIDTH)
        _say_new_rows(out, states)
        return
    with _standard_output(), Live(console=out, auto_refresh=False) as live:
        for title, rows in states:
            live.update(_fitting(out, columns, rows, title), refresh=True)


def _fitting(out: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table | Text:
    """The table; where the terminal is too low for it, a line for each row, as elsewhere than on a terminal."""
    whole = _grid(columns, rows, title)
    if len(out.render_lines(whole)) < out.height:
        return whole
    return Text("\n".join(map(_line, ([title], *rows))), no_wrap=True, overflow="ellipsis")


def _say_new_rows(out: Console, states: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> None:
    shown: list[Sequence[str]] = []
    for title, rows in states:
        for row in ([title], *rows):
            if row not in shown:
                with _standard_output():
                    out.print(_line(row), soft_wrap=True)
        shown = [[title], *rows]


def _line(row: Sequence[str]) -> str:
    return printable("  ".join(filter(None, row)))


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> Table:
    grid = Table(title=None if title is None else printable(title), title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(printable(column), overflow="fold")
    for row in rows:
        grid.add_row(*map(printable, row))
    return grid


def say(text: str) -> None:
    """Print a line of a result to standard output, as it is."""
    with _standard_output():
        _plain_console(soft_wrap=True).print(printable(text))


def _standard_output() -> contextlib.AbstractContextManager[None]:
    return os_errors.named(Path("standard output"))


class Bar:
    """A running count of finished units; `advance` is all a stage calls."""

    def __init__(self, what: str, total: int, unit: str, start: int, progress: Progress | None) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._start = start
        self._began = self._spoke = time.monotonic()
        self._progress = progress
        self._task = progress.add_task(what, total=total, completed=start, rate="", ends=None) if progress else None

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more units as done; `note` is shown behind the rate (a loss, say)."""
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        remaining = (self._total - self._done) / max(rate, 1e-9)
        text = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2f} {self._unit}/s"
        if self._progress is not None and self._task is not None:
            ends = now + remaining if rate > 0 else None
            self._progress.update(
                self._task, completed=self._done, rate=f"{text} {printable(note)}".rstrip(), ends=ends
            )
        elif now - self._spoke >= _PLAIN_SECONDS:
            self._spoke = now
            _logger.info(
                "%s  %s/%s  %s  %s left  %s",
                *(self._what, f"{self._done:,}", f"{self._total:,}", text, duration(remaining), printable(note)),
            )


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f}")


class _TimeLeft(ProgressColumn):
    """At the speed so far, which also knows units that take minutes each."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        if ends is None or ends - time.monotonic() > _MOST_SECONDS:
            return Text("-:--:-- left")
        minutes, seconds = divmod(max(0, round(ends - time.monotonic())), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")


class _Rest(ProgressColumn):
    """Speed and note, in the room that is left: they are cut, and nothing else."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["rate"], no_wrap=True, overflow="ellipsis")


def _columns(width: int) -> list[ProgressColumn]:
    """What was done of how much and how long it takes always fit; names longer than a quarter of the line are cut."""
    name = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    return [
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=max(4, min(40, width // 5)), table_column=Column(no_wrap=True)),
        _Count(table_column=Column(no_wrap=True)),
        _TimeLeft(table_column=Column(no_wrap=True)),
        _Rest(table_column=Column(overflow="ellipsis")),
    ]


@contextlib.contextmanager
def progress(what: str, total: int, *, unit: str = "images", start: int = 0) -> Iterator[Bar]:
    """Show the progress of long work, its speed and the time left; `start` units were done before."""
    if not (total and _console.is_terminal and _logger.handlers and _logger.isEnabledFor(logging.INFO)):
        yield Bar(what, total, unit, start, None)
        return
    with Progress(*_columns(_console.width), console=_console) as live:
        yield Bar(what, total, unit, start, live)
