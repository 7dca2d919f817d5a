"""The files that an evaluation set stands for, without opening it."""

import os
from pathlib import Path


def files_behind_set(where: str, *, trained: bool = True) -> list[Path]:
    """Every file in the folder of a set, links followed, sorted; none for a built-in set, a URL or a missing folder.

    Hidden files are no part of a set. A URL names what the cache keeps, and what is there is not fetched again.

    Args:
        where: As `open_set` takes it.
        trained: Whether training images are read; if not, the folder `train` is left out.
    """
    root = Path(where)
    if not root.is_dir():
        return []

    files: list[Path] = []
    for folder, names, here in os.walk(root, followlinks=True):
        path = Path(folder)
        files += [path / name for name in here if not name.startswith(".")]
        # os.walk goes into what is left in this list.
        names[:] = [name for name in names if not name.startswith(".") and not _leads_up(path / name)]
        if not trained and path == root:
            names[:] = [name for name in names if name != "train"]
    return sorted(file for file in files if file.is_file())


def _leads_up(folder: Path) -> bool:
    """Whether a folder is a link to one that holds it, where a walk would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
