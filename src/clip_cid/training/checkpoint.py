"""The files of checkpoints: each is whole or absent, and damage is detected before anything is loaded.

The random draws of a step (order, crops, captions, negatives, dropout) are a function of the seed and the
step's number, so a checkpoint needs no state of a random generator.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clip_cid import log
from clip_cid.errors import RunError
from clip_cid.run_folder import atomic_file

_FORMAT = 5
_BEST = "best.pt"


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `step-000400.pt`, whole or not at all, and drop all but the newest `keep`.

    Args:
        folder: Where checkpoints lie; made when it does not exist.
        step: How many steps are done.
        state: Tensors, numbers, strings and lists and dicts of these, so that it can be read without unpickling code.
        keep: How many to keep; at least 2, in case the newest is damaged.
    """
    folder.mkdir(exist_ok=True)
    path = path_of(folder, step)
    _write(path, {**state, "step": step})
    for _, old in list(_newest_first(folder))[keep:]:
        old.unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Write the weights of the best student so far, whole or not at all."""
    folder.mkdir(exist_ok=True)
    _write(folder / _BEST, state)


def load_best(folder: Path, *, key: str) -> dict[str, Any]:
    """The weights that `save_best` wrote, on the CPU.

    Raises:
        RunError: It is missing, damaged, or of another training.
    """
    path = folder / _BEST
    problem = _damage(path) if path.is_file() else "there is none"
    state: dict[str, Any] = {} if problem else torch.load(path, map_location="cpu", weights_only=True)
    if problem or state.get("format") != _FORMAT or state.get("key") != key:
        raise RunError(
            f"{path}: the weights of the best student cannot be read ({problem or 'of another training'}).",
            fix=f"Delete {folder.parent} to train from the start, or set distill.validation.keep: last.",
        )
    return state


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:06d}.pt"


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint; None when there is none."""
    return next((step for step, _ in _newest_first(folder)), None)


def load(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that `load_newest` has found whole in another process, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_newest(folder: Path, *, key: str) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint, on the CPU; None when there is none. Torn ones are named and removed.

    Raises:
        RunError: The checkpoint was made with other settings or other data (`key` differs), or by another version.
    """
    for left_by_a_kill in (*folder.glob(".step-*"), *folder.glob(f".{_BEST}*")):
        left_by_a_kill.unlink()
    for _, path in _newest_first(folder):
        if problem := _damage(path):
            log.warn(f"{path.name} is damaged ({problem}); resuming from the checkpoint before it")
            path.unlink()
            continue
        state = load(path)
        if state.get("format") != _FORMAT or state.get("key") != key:
            raise RunError(
                f"{path}: made with other settings, other data or another version of clip-cid.",
                fix=f"Delete {folder.parent} to train from the start, or go back to what it was made with.",
            )
        return state
    return None


def _write(path: Path, state: dict[str, Any]) -> None:
    """PyTorch gets a file object and no path: a failed write then says why it failed."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        torch.save({**state, "format": _FORMAT}, handle)


def _newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    paths = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.pt")}
    yield from sorted(paths.items(), reverse=True)


def _damage(path: Path) -> str:
    """The damage in the bytes of a checkpoint; empty if there is none. PyTorch does not compare checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        return str(error)
    return f"wrong checksum of {member}" if member else ""
