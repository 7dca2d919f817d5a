"""Forks a process for each command, from one that has loaded the libraries: an import costs more than the command.

It is started by `commands.py` with the shim preloaded, and speaks lines of JSON.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import Any

_PRELOADED = (
    *("open_clip", "matplotlib.pyplot", "sklearn.linear_model", "scipy.stats", "clip_cid.cli", "clip_cid.check"),
    *(f"clip_cid.stages.{stage}" for stage in ("embed", "balance", "cluster", "distill", "evaluate", "draw", "report")),
    *("clip_cid.publish.subset", "clip_cid.publish.hub", "clip_cid.ablations.runs", "clip_cid.data.sample.write"),
    "clip_cid.report.drawing.all_figures",
)


def main() -> None:
    _load()
    _say({"ready": True})
    for line in sys.stdin:
        _say(_do(json.loads(line)))


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _load() -> None:
    import importlib

    for name in _PRELOADED:
        importlib.import_module(name)
    import open_clip
    import torch

    torch.set_num_threads(1)
    open_clip.get_tokenizer("ViT-B-32")  # its table of merges


def _do(job: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a child; returns how it ended."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(job)

    handle = os.pidfd_open(child)
    wait, hangs = job["kill_after"] or job["patience"], False
    if not select.select([handle], [], [], wait)[0]:
        hangs = not job["kill_after"]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.close(handle)

    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has started
    return {
        "code": os.waitstatus_to_exitcode(status),
        "hangs": hangs,
        "seconds": time.monotonic() - started,
        "memory": usage.ru_maxrss * 1024,
    }


def _be_the_command(job: dict[str, Any]) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(job["folder"])
        for number, path in ((1, job["stdout"]), (2, job["stderr"])):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        if job["memory"]:
            resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))
        if job["harm"]:
            ctypes.CDLL(None).faults_arm(
                "\n".join(job["watched"]).encode(),
                *(ctypes.c_int(job["harm"]["action"]), ctypes.c_long(job["harm"]["at"])),
                *(ctypes.c_int(job["harm"]["error"]), ctypes.c_int(job["harm"]["kinds"])),
                job["harm"]["log"].encode(),
            )
        code = _exit_code(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    """As Python ends with it."""
    from clip_cid import cli

    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    main()
