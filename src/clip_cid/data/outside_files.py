"""Files made elsewhere that a stage reads: a cheap digest of each, which shows a change."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from clip_cid.errors import DataError
from clip_cid.file_digests import digest
from clip_cid.recipe import PairsConfig
from clip_cid.stage_names import DISTILL


def of_pairs(pairs: PairsConfig) -> dict[str, str]:
    """The pairs to train on; empty if the recipe names none."""
    return {"pairs": _pairs_digest(pairs)} if pairs.source else {}


def of_pair_sets(sources: Mapping[str, tuple[str, ...]], pairs: PairsConfig) -> dict[str, str]:
    """Sets of pairs by name, read as `pairs` says; the stage reports one that does not exist."""
    digests: dict[str, str] = {}
    for name, source in sources.items():
        with contextlib.suppress(DataError):
            digests[name] = _pairs_digest(pairs.model_copy(update={"source": source}))
    return digests


def of_sets(sets: Mapping[str, str]) -> dict[str, str]:
    """Evaluation sets by name, without a look at each of a million images: shards, splits and class folders."""
    return {name: _listing([*Path(where).glob("*"), *Path(where).glob("*/*")]) for name, where in sets.items()}


def of_paths(*paths: Path | None) -> dict[str, str]:
    """Files, and folders with all that is in them; those that do not exist are skipped."""
    return {str(path): _listing(_files(path)) for path in paths if path is not None and path.name and path.exists()}


def weights_file(reference: str) -> Path | None:
    """The weights file behind a `run:` or `local-dir:` reference; None for a model from elsewhere."""
    kind, _, path = reference.partition(":")
    folders = {"run": Path(path) / DISTILL / "student", "local-dir": Path(path)}
    return folders[kind] / "open_clip_model.safetensors" if kind in folders else None


def _pairs_digest(pairs: PairsConfig) -> str:
    from clip_cid.data.pairs.pairs import fingerprint  # pyarrow, which `clip-cid --help` does without

    return digest(fingerprint(pairs))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _listing(paths: list[Path]) -> str:
    """A digest of names, sizes and times."""
    return digest([(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in sorted(paths)])
