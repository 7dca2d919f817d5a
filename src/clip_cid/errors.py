"""The errors a user can fix. The command line prints them in two lines; others keep their traceback."""

from collections.abc import Sequence
from typing import Any


class ClipCidError(Exception):
    """A problem the user can fix: what is wrong and where, in numbers; then what to do."""

    exit_code = 1

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(f"{problem}\n{fix}")
        self.problem = problem
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """For the way from another process, with what was noted on it and whatever a kind of its own holds."""
        return _again, (type(self), self.problem, self.fix), self.__dict__


def _again(kind: type[ClipCidError], problem: str, fix: str) -> ClipCidError:
    error = kind.__new__(kind)
    ClipCidError.__init__(error, problem, fix=fix)
    return error


class ConfigError(ClipCidError):
    """A setting is misspelt, out of its limits, or contradicts another."""

    exit_code = 2


class DataError(ClipCidError):
    """An input is missing, broken, or does not belong to the others."""


class RunError(ClipCidError):
    """A run folder is in use, incomplete, or changed by someone else."""


class HubError(ClipCidError):
    """The Hugging Face Hub cannot be reached, or refuses."""


class MissingExtraError(ClipCidError):
    """An optional part is not installed."""

    def __init__(self, feature: str, extra: str, modules: Sequence[str]) -> None:
        are = "is" if len(modules) == 1 else "are"
        super().__init__(
            f"{feature} needs an optional part: {', '.join(modules)} {are} not installed.",
            fix=f'pip install "clip-cid[{extra}]"',
        )
