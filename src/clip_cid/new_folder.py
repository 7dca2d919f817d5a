"""A folder outside a run that appears whole or not at all: an export, a sample."""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path

from clip_cid import os_errors
from clip_cid.run_folder import lives, own_host, own_mark, sync, sync_tree


@contextlib.contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A folder beside `out` that takes its place, on the disk for good, when the block ends well.

    What stood at `out` is removed then, and comes back if the last step fails.

    Raises:
        ConfigError: `out` is an address such as s3://bucket/folder.
    """
    os_errors.refuse_address(out)
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


def drop_left(path: Path) -> None:
    """Remove what processes of this host that were killed have left beside `path` under temporary names."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.(tmp|part|old)-{re.escape(own_host())}-(\d+)-[0-9a-f]{{8}}")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if (match := ours.fullmatch(left.name)) and not lives(int(match[2])):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
