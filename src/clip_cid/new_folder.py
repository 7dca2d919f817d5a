"""A folder outside a run that appears whole or not at all: an export, a sample."""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable, Collection, Generator
from pathlib import Path

from clip_cid import os_errors
from clip_cid.errors import RunError
from clip_cid.run_folder import MANIFEST, lives, own_host, own_mark, sync, sync_tree
from clip_cid.stage_names import STAGE_NAMES


@contextlib.contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A folder beside `out` that takes its place, on the disk for good, when the block ends well.

    What stood at `out` is removed then, and comes back if the last step fails. A link stays; what it names is replaced.

    Raises:
        ConfigError: `out` is an address such as s3://bucket/folder.
    """
    os_errors.refuse_address(out)
    out = out.resolve() if out.is_symlink() else out
    out.parent.mkdir(parents=True, exist_ok=True)
    drop_left(out)
    part, old = (out.with_name(f".{out.name}.{suffix}-{own_mark()}") for suffix in ("part", "old"))
    try:
        with os_errors.named(out, temporary=part):
            part.mkdir()
            yield part
            sync_tree(part)

            # The new in the place of the old.
            if out.exists():
                os.replace(out, old)
            try:
                os.replace(part, out)
            except OSError:
                if old.exists():
                    os.replace(old, out)
                raise
            sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse_foreign(out: Path, what: str, *, is_one: Callable[[Path], bool], names: Collection[str]) -> None:
    """Refuse, before any work is done, a place that holds anything but an earlier folder of this kind.

    Args:
        out: The folder that `new_folder` will replace.
        what: The kind in words, such as "an export of clip-cid".
        is_one: Whether a folder is of this kind.
        names: All that one may have.

    Raises:
        RunError: `out` is a file, holds something else, holds files of others, or is a part of a run's stage.
    """
    another = "Give another folder"
    for parent in out.resolve().parents:
        if parent.name in STAGE_NAMES and (parent / MANIFEST).is_file():
            raise RunError(f"{out}: is in the folder of a stage, {parent}.", fix=f"{another}, outside the run.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_one(out):
        raise RunError(f"{out}: exists and is not {what}.", fix=f"{another}, or remove it.")
    if foreign := sorted(path.name for path in out.iterdir() if path.name not in names):
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        raise RunError(
            f"{out}: is {what} that would be replaced, but holds {', '.join(foreign[:3])}{more} too.",
            fix=f"{another}, or move these out of it.",
        )


def drop_left(path: Path) -> None:
    """Remove what processes of this host that were killed have left beside `path` under temporary names."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.(tmp|part|old)-{re.escape(own_host())}-(\d+)-[0-9a-f]{{8}}")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if (match := ours.fullmatch(left.name)) and not lives(int(match[2])):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
