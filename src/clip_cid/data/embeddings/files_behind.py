"""Which files an input stands for, links and manifests followed; a change in any of them is a change of the input.

Light on purpose: `clip-cid status` reads this without numpy and pyarrow.
"""

import json
from collections.abc import Iterator
from pathlib import Path

STORE_FILE = "store.json"
_ARRAYS = (".npy", ".npz")


def files_behind(path: Path) -> list[Path]:
    """The files that `path` stands for, each path once, sorted; none if nothing is there.

    An embedding store stands for its manifest and the files named in it, wherever they are; a file of embeddings
    also for the metadata beside it; any other folder for all files in it, also below linked folders. Hidden files
    do not count, nor does a file that is missing.
    """
    if path.is_file():
        metadata = path.with_suffix(".parquet")
        beside = [metadata] if path.suffix in _ARRAYS and metadata.is_file() else []
        return sorted([path, *beside])
    return sorted(set(_below(path, above=frozenset())))


def is_of_embeddings(where: str) -> bool:
    """Whether a set of `balance.against` is given by embeddings: a .npy, or an embedding store."""
    return where.endswith(".npy") or (Path(where) / STORE_FILE).is_file()


def missing_behind(store: Path) -> list[Path]:
    """The files that an embedding store names and that are not there."""
    return [path for path in _named(store) if not path.is_file()]


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files of a folder; `above` are the real folders it lies in, so that a link to one of them ends."""
    if not folder.is_dir() or (real := folder.resolve()) in above:
        return
    if (folder / STORE_FILE).is_file():
        yield from _of_store(folder)
        return

    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        else:
            yield from _below(path, above | {real})


def _of_store(folder: Path) -> Iterator[Path]:
    """A store's manifest and the files it names; of a manifest that cannot be read, the manifest alone."""
    yield folder / STORE_FILE
    yield from (path for path in _named(folder) if path.is_file())


def _named(folder: Path) -> list[Path]:
    try:
        values = json.loads((folder / STORE_FILE).read_text(encoding="utf-8"))
        root = Path(values["root"]) if values["root"] else folder
        return [root / file["path"] for shard in values["shards"] for file in shard["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
