"""Files made elsewhere that a stage reads: their state, which costs no reading, and their contents, which decide.

A file of the same path, bytes and time of change is unchanged. Of any other the digest of its contents decides,
computed once and remembered in the run folder. Links count as what they point to, and a place does not count: data
that were moved, copied or touched are the same.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid import os_errors
from clip_cid.addresses import is_remote, without_secrets
from clip_cid.data.embeddings.files_behind import files_behind, is_of_embeddings
from clip_cid.data.inputs import copy_of
from clip_cid.data.sets.files_behind import files_behind_set
from clip_cid.errors import DataError
from clip_cid.file_digests import FileDigests, digest, file_state, state_of_all
from clip_cid.recipe import PairsConfig
from clip_cid.remote import files as remote
from clip_cid.remote.contract import RemoteFile

_DECISIONS = "decisions"


@dataclass(frozen=True)
class Outside:
    """One input made elsewhere: some files, or pairs."""

    state: Callable[[], str]
    """A digest of names, bytes and times."""
    contents: Callable[[], str]
    """A digest of what is inside; read only if the state is not known."""
    where: tuple[str, ...]
    """As the recipe names it."""
    is_here: Callable[[], bool]
    """Whether all of it can be found."""
    as_before: Callable[[], str | None] = str
    """What earlier versions recorded in place of the contents: None for no record, empty if it was the same."""


@dataclass(frozen=True)
class Reader:
    """Reads inputs for one run, whose folder remembers their digests."""

    digests: FileDigests
    index: Path | None
    """Where the index of pairs is kept; None for a run folder that cannot be written."""
    cache_dir: Path | None

    def pairs(self, settings: PairsConfig) -> Outside:
        """Image-text pairs, with the fields that `settings` keeps."""

        def state() -> str:
            from clip_cid.data.pairs.contents import state_of_pairs  # pyarrow, which `clip-cid --help` does without

            return state_of_pairs(settings, index=self.index, cache_dir=self.cache_dir)

        def contents() -> str:
            from clip_cid.data.pairs.contents import contents_of_pairs

            return contents_of_pairs(settings, self.digests, index=self.index, cache_dir=self.cache_dir)

        def as_before() -> str:
            from clip_cid.data.pairs.contents import addresses_of_pairs

            return addresses_of_pairs(settings)

        shown = tuple(map(without_secrets, settings.source))
        return Outside(state, contents, shown, lambda: _are_here(settings), as_before)

    def num_pairs(self, settings: PairsConfig) -> int | None:
        """How many image-text pairs there are; None if they are not here."""
        if not _are_here(settings):
            return None
        from clip_cid.data.pairs.pairs import open_pairs

        return len(open_pairs(settings, index=self.index, cache_dir=self.cache_dir))

    def embeddings(self, path: Path) -> Outside:
        """A store, or files of any layout, with all that they refer to; perhaps at an address."""
        if address := os_errors.address_of(path):
            return self._elsewhere(address, self.embeddings)
        return self._files(path, files_behind(path))

    def against(self, where: str) -> Outside:
        """A set to compare with, by its test images or by their embeddings."""
        return self.embeddings(Path(where)) if is_of_embeddings(where) else self.set(where, trained=False)

    def set(self, where: str, *, trained: bool = True) -> Outside:
        """An evaluation set; `trained` if its training images are read too."""
        if is_remote(where):
            return self._set_elsewhere(where, trained=trained)
        return self._files(Path(where), files_behind_set(where, trained=trained))

    def model(self, reference: str, files: Sequence[Path], *, architecture: str = "") -> Outside:
        """The files behind a model, and the name of its architecture if none of them says it."""
        common = Path(os.path.commonpath([file.parent for file in files])) if files else Path(reference)
        return self._files(common, files, where=reference, prefix=architecture)

    def file(self, path: Path) -> Outside:
        """A file or a folder with all that is in it; perhaps at an address."""
        if address := os_errors.address_of(path):
            return self._elsewhere(address, self.file)
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        return self._files(path, files)

    def decisions(self, path: Path) -> Outside | None:
        """Decisions of a person: what they decide counts, and not their order; None for a file that decides nothing.

        Of a file at an address each version is read once.
        """
        address = os_errors.address_of(path)

        def decided(file: Path = path) -> str:
            from clip_cid.data.balance.decisions import read_decisions  # numpy, which `clip-cid --help` does without

            decisions = read_decisions(file)
            return decisions.digest if decisions else ""

        def version() -> str:
            return digest([_DECISIONS, remote.ask(address).state])

        def decided_elsewhere() -> str:
            return self._known(version(), lambda: decided(copy_of(address, self.cache_dir)))

        outside = Outside(decided, decided, (str(path),), path.is_file)
        if address:
            outside = Outside(version, decided_elsewhere, (without_secrets(address),), lambda: _answers(version))
        try:
            if outside.is_here() and not outside.contents():
                return None
        except DataError:
            pass  # it is said where they are read
        return outside

    def files(self, paths: Sequence[Path]) -> Outside:
        """Some files, whose order counts; perhaps at addresses."""
        addresses = [os_errors.address_of(path) for path in paths]
        if any(addresses):
            return self._files_elsewhere(paths, addresses)
        named = _numbered(paths)
        return Outside(
            state=lambda: state_of_all(named),
            contents=lambda: self.digests.of_all(named),
            where=tuple(map(str, paths)),
            is_here=lambda: all(path.is_file() for path in paths),
        )

    def _elsewhere(self, address: str, of_copy: Callable[[Path], Outside]) -> Outside:
        """The file or folder at an address: its version is asked for, and only a new one is copied and read."""

        def state() -> str:
            there = remote.at(address)
            return digest([there.state] if isinstance(there, RemoteFile) else _states(there))

        def contents() -> str:
            return self._known(state(), lambda: of_copy(copy_of(address, self.cache_dir)).contents())

        return Outside(state, contents, (without_secrets(address),), lambda: _answers(state))

    def _set_elsewhere(self, where: str, *, trained: bool) -> Outside:
        splits = ("train", "val", "test") if trained else ("val", "test")

        def state() -> str:
            from clip_cid.data.sets.remote_sets import files_of_set  # pyarrow, which `clip-cid --help` does without

            return digest(_states(files_of_set(where, splits, self.cache_dir)))

        def of_copy() -> str:
            from clip_cid.data.sets.remote_sets import fetch_set

            return self.set(str(fetch_set(where, splits, self.cache_dir)), trained=trained).contents()

        def contents() -> str:
            return self._known(state(), of_copy)

        shown = (without_secrets(where),)
        return Outside(state, contents, shown, lambda: _answers(state), as_before=lambda: None)

    def _files_elsewhere(self, paths: Sequence[Path], addresses: Sequence[str]) -> Outside:
        """Some of the files are at addresses."""

        def state() -> str:
            pairs = zip(paths, addresses, strict=True)
            return digest([remote.ask(address).state if address else file_state(path) for path, address in pairs])

        def contents() -> str:
            pairs = zip(paths, addresses, strict=True)
            here = [copy_of(address, self.cache_dir) if address else path for path, address in pairs]
            return self.digests.of_all(_numbered(here))

        shown = tuple(
            without_secrets(address) if address else str(path) for path, address in zip(paths, addresses, strict=True)
        )
        return Outside(state, contents, shown, lambda: _answers(state))

    def _known(self, state: str, read: Callable[[], str]) -> str:
        """The contents of what has this state, read if they are not known."""
        if (contents := self.digests.recall(state)) is None:
            contents = read()
            self.digests.keep(state, contents)
        return contents

    def _files(self, root: Path, files: Sequence[Path], *, where: str = "", prefix: str = "") -> Outside:
        named = {f"{prefix}{name}": file for name, file in _named(root, files).items()}
        return Outside(
            state=lambda: state_of_all(named),
            contents=lambda: self.digests.of_all(named),
            where=(where or str(root),),
            is_here=lambda: bool(named),
        )


def _named(root: Path, files: Sequence[Path]) -> Mapping[str, Path]:
    """Files by a name that does not change when all of them are moved together."""
    names: dict[str, Path] = {}
    for file in files:
        inside = file != root and file.is_relative_to(root)
        name = file.relative_to(root).as_posix() if inside else file.suffix
        names[f"{len(names):09d}" if name in names else name] = file
    return names


def _numbered(paths: Sequence[Path]) -> dict[str, Path]:
    return {f"{number:09d}": path for number, path in enumerate(paths)}


def _states(files: Mapping[str, RemoteFile]) -> list[list[Any]]:
    return [[name, *file.state] for name, file in sorted(files.items())]


def _answers(state: Callable[[], object]) -> bool:
    """Whether what is elsewhere can be found: it is there, and its server answers."""
    try:
        state()
    except (DataError, OSError):
        return False
    return True


def _are_here(settings: PairsConfig) -> bool:
    from clip_cid.data.pairs.sources import find_sources

    try:
        return bool(find_sources(settings))
    except DataError:
        return False
