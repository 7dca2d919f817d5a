"""Answers of servers that hold for a minute: one command asks for the same file many times."""

import functools
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_SECONDS = 60.0

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")
_memories: list[dict[Any, tuple[float, Any]]] = []


def remembered(ask: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
    """The function, whose answers are remembered for a minute; a failure is not."""
    memory: dict[Any, tuple[float, Any]] = {}
    _memories.append(memory)

    @functools.wraps(ask)
    def asked(*given: _Given.args, **named: _Given.kwargs) -> _Answer:
        key: Any = given
        now = time.monotonic()
        when, answer = memory.get(key, (0.0, None))
        if key not in memory or now - when > _SECONDS:
            answer = ask(*given, **named)
            memory[key] = (now, answer)
        return answer

    return asked


def forget() -> None:
    """Ask anew from now on."""
    for memory in _memories:
        memory.clear()
