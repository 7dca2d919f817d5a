"""Answers of servers that hold for a minute: one command asks for the same file many times.

That a server cannot be reached holds as long, or each of these questions would wait for it.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from clip_cid.remote.contract import UnreachableError

_SECONDS = 60.0

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")
_memories: list[dict[Any, tuple[float, Any]]] = []


def remembered(ask: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
    """The function, whose answers are remembered for a minute."""
    memory: dict[Any, tuple[float, Any]] = {}
    _memories.append(memory)

    @functools.wraps(ask)
    def asked(*given: _Given.args, **named: _Given.kwargs) -> _Answer:
        key: Any = given
        now = time.monotonic()
        when, answer = memory.get(key, (None, None))
        if when is None or now - when > _SECONDS:
            try:
                answer = ask(*given, **named)
            except UnreachableError as error:
                answer = error
            memory[key] = (now, answer)
        if isinstance(answer, UnreachableError):
            raise answer
        return cast(_Answer, answer)

    return asked


def forget() -> None:
    """Ask anew from now on."""
    for memory in _memories:
        memory.clear()
