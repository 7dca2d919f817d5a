"""Frozen features of a model before and after the projection: one pass over each split, then a cache."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from clip_cid import log, units
from clip_cid.data.npy_files import new_npy
from clip_cid.data.pairs.decoding import decoded_batches
from clip_cid.data.pairs.pair import BadSample
from clip_cid.devices import Copies, Returning, one_ahead
from clip_cid.errors import DataError, RunError
from clip_cid.evaluation.towers import after_only, both_features
from clip_cid.file_digests import sha256_file
from clip_cid.models.clip import Clip
from clip_cid.models.teacher import weights_sha256
from clip_cid.run_folder import atomic_file, read_json, write_json

MAX_BAD_SHARE = 0.01
"""A split with more undecodable images than this, and more than one, is not evaluated: its score would not compare."""


class UnmeasurableError(DataError):
    """A set turns out not to be measurable while it is measured; the others are measured without it."""


_ENTRY = "entry.json"
"""The last file of an entry of the cache: the images that cannot be decoded, and the digest of each other file."""

_Batch = tuple[list[int], Tensor, dict[int, str]]
"""Rows, their pixels, and the rows that cannot be decoded with the reason."""


@runtime_checkable
class ImageSource(Protocol):
    """Images in a fixed order, such as `data.evaluation_sets.LabelledImages`."""

    @property
    def title(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, row: int) -> str: ...

    def load(self, row: int) -> Image.Image: ...


@dataclass(frozen=True)
class ImageFeatures:
    """Features of the images of a split that could be decoded, in float32 and not normalized."""

    rows: Int[np.ndarray, " images"]
    """Their rows in the source."""
    before: Float[np.ndarray, "images width"] | None
    """Before the projection; None if only the others were computed."""
    after: Float[np.ndarray, "images dim"]
    bad: tuple[str, ...]
    """The images left out, with the reason."""


class Encoder:
    """A model whose features are computed once and then read from `cache`.

    An entry is keyed by content: the model's weights, configuration, preprocessing and tokenizer, and the files behind
    the images, or the texts. An entry that is not as it was written is made again.

    Args:
        name: The model's, in messages.
        clip: The model.
        cache: The folder of the entries.
        device: Where the model is.
        batch_size: Images or texts at once.
        workers: Processes that decode.
        tokenizer: File -> SHA-256 of what the model's tokenizer was read from; empty for one that open_clip has.
    """

    def __init__(
        self,
        name: str,
        clip: Clip,
        cache: Path,
        *,
        device: torch.device,
        batch_size: int,
        workers: int,
        tokenizer: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.clip, self.device, self.batch_size = name, clip, device, batch_size
        self.digest = weights_sha256(clip.model)
        self._cache, self._workers, self._copies = cache, workers, Copies(device)
        self._tokenizer = dict(tokenizer or {})
        self._used: set[str] = set()
        self._unmeasurable: dict[Path, UnmeasurableError] = {}
        self._checked: dict[Path, str] = {}
        self._said: set[str] = set()

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that decide the model's features: weights, configuration, preprocessing and tokenizer."""
        return {
            "weights": self.digest,
            "model": self.clip.model_cfg,
            "preprocess": self.clip.preprocess_cfg,
            "tokenizer": self._tokenizer,
        }

    def forget_used(self) -> list[str]:
        """The cache entries used since the last call."""
        used, self._used = sorted(self._used), set()
        return used

    def images(self, source: ImageSource, *, before: bool) -> ImageFeatures:
        """Features of every image of a source; with `before` also those before the projection.

        Raises:
            ConfigError: `before`, and the model's tower has no projection that is known here.
            UnmeasurableError: More than 1 % of the images, and more than one, cannot be decoded; or none can.
            DataError: The model gives NaN or a zero vector.
        """
        entry = self._entry(source.title, {"images": source.fingerprint, "preprocess": self.clip.preprocess_cfg})
        wanted = ("before", "after") if before else ("after",)
        bad = self._left_out(entry, [f"{kind}.npy" for kind in wanted])
        if bad is None:
            bad = self._compute_once(source, entry, before=before)

        arrays = {kind: np.load(entry / f"{kind}.npy", mmap_mode="r") for kind in wanted}
        rows = np.setdiff1d(np.arange(len(source)), np.array(sorted(bad), dtype=np.int64))
        if bad:
            arrays = {kind: array[rows] for kind, array in arrays.items()}

        named = tuple(f"{source.name(row)}: {bad[row]}" for row in sorted(bad))
        self._say_bad(source, named)
        return ImageFeatures(rows, arrays.get("before"), arrays["after"], named)

    def texts(self, title: str, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Unit embeddings of texts, in float32.

        Raises:
            DataError: The model gives NaN for a text.
        """
        entry = self._entry(title, {"texts": list(texts), "tokenizer": self._tokenizer})
        path = entry / "texts.npy"
        if self._left_out(entry, [path.name]) is None:
            entry.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "wb") as handle:
                np.save(handle, self._encode(title, texts))
            self._complete(entry, title, [path.name], bad={})
        return np.load(path)

    def _left_out(self, entry: Path, files: Sequence[str]) -> dict[int, str] | None:
        """The images an entry leaves out, with the reason; None unless these of its files are as they were written."""
        try:
            values = read_json(entry / _ENTRY)
            if any(self._digest(entry / file) != values["files"][file] for file in files):
                return None
            return {int(row): str(reason) for row, reason in values["bad"].items()}
        except (RunError, OSError, AttributeError, KeyError, TypeError, ValueError):
            return None

    def _digest(self, path: Path) -> str:
        """The digest of a cached file, which is read for it once in the life of this encoder."""
        if path not in self._checked:
            self._checked[path] = sha256_file(path)
        return self._checked[path]

    def _complete(self, entry: Path, title: str, files: Sequence[str], *, bad: Mapping[int, str]) -> None:
        """Say that an entry is whole: the last thing that is written of it."""
        self._checked = {path: digest for path, digest in self._checked.items() if path.parent != entry}
        digests = {file: self._digest(entry / file) for file in files}
        write_json(entry / _ENTRY, {"title": title, "model": self.name, "bad": bad, "files": digests})

    def _say_bad(self, source: ImageSource, named: tuple[str, ...]) -> None:
        """Once for each split, however many tasks read it."""
        if named and source.title not in self._said:
            self._said.add(source.title)
            log.warn(
                f"{source.title}: {len(named)} of {len(source):,} images cannot be used and are left out,"
                f" the first {named[0]}"
            )

    def _encode(self, title: str, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        model: Any = self.clip.model

        def begin(batch: list[str]) -> Returning:
            return Returning(model.encode_text(self._copies(self.clip.tokenizer(batch)), normalize=True).float())

        starts, blocks = range(0, len(texts), self.batch_size), list[np.ndarray]()
        batches = (list(texts[start : start + self.batch_size]) for start in starts)
        with log.progress(f"texts {self.name} {title}", len(texts), unit="texts") as bar, torch.inference_mode():
            for begun in one_ahead(batches, begin, self.device):
                blocks.append(begun.here().numpy())
                bar.advance(len(blocks[-1]))

        vectors = np.concatenate(blocks)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise DataError(
                f"{self.name}: {len(wrong):,} of {len(texts):,} texts embed as NaN, the first {texts[wrong[0]]!r}.",
                fix="The model is broken: look at its training, or load other weights.",
            )
        return vectors

    def _entry(self, title: str, parts: dict[str, Any]) -> Path:
        parts = {**parts, "weights": self.digest, "model": self.clip.model_cfg, "title": title}
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', title)}-{key}"
        self._used.add(name)
        return self._cache / name

    def _compute_once(self, source: ImageSource, entry: Path, *, before: bool) -> dict[int, str]:
        """As `_compute`; what is refused for one protocol is not decoded again for the next."""
        if entry in self._unmeasurable:
            raise self._unmeasurable[entry]
        try:
            return self._compute(source, entry, before=before)
        except UnmeasurableError as error:
            self._unmeasurable[entry] = error
            raise

    def _compute(self, source: ImageSource, entry: Path, *, before: bool) -> dict[int, str]:
        """Write an entry; returns the images that cannot be decoded, with the reason."""
        entry.mkdir(parents=True, exist_ok=True)
        kinds = ("before", "after") if before else ("after",)
        bad: dict[int, str] = {}
        limit = min(max(1, MAX_BAD_SHARE * len(source)), len(source) - 1)
        with contextlib.ExitStack() as stack:
            paths = {kind: stack.enter_context(atomic_file(entry / f"{kind}.npy")) for kind in kinds}
            taps = stack.enter_context(both_features(self.clip)) if before else after_only(self.clip)
            bar = stack.enter_context(log.progress(f"features {self.name} {source.title}", len(source)))
            stack.enter_context(torch.inference_mode())
            batches = stack.enter_context(contextlib.closing(self._batches(source)))

            def begin(batch: _Batch) -> tuple[list[int], dict[str, Returning], dict[int, str]]:
                rows, pixels, broken = batch
                tapped = zip(("before", "after"), taps(self._copies(pixels)), strict=True) if rows else ()
                return rows, {kind: Returning(values.float()) for kind, values in tapped if kind in kinds}, broken

            arrays: dict[str, np.memmap] = {}
            for rows, begun, broken in one_ahead(batches, begin, self.device):
                bad.update(broken)
                if len(bad) > limit:
                    raise _too_many_bad(source, bad)

                for kind, returning in begun.items():
                    values = returning.here().numpy()
                    if kind not in arrays:
                        arrays[kind] = new_npy(paths[kind], np.float32, (len(source), values.shape[1]))
                        arrays[kind][:] = np.nan  # what is read by mistake cannot pass for a feature
                    _check_finite(self.name, source, rows, values)
                    arrays[kind][rows] = values
                bar.advance(len(rows) + len(broken))

            for array in arrays.values():
                array.flush()
        self._complete(entry, source.title, [f"{kind}.npy" for kind in kinds], bad=bad)
        return bad

    def _batches(self, source: ImageSource) -> Generator[_Batch]:
        starts = range(0, len(source), self.batch_size)
        return decoded_batches(
            _Decoded(source, self.clip.preprocess),
            (list(range(start, min(start + self.batch_size, len(source)))) for start in starts),
            _stack,
            workers=self._workers if len(starts) > 1 else 0,
            smaller_batch="machine.embed_batch",
            pin=self.device.type == "cuda",
        )


def prune(cache: Path, used: frozenset[str]) -> int:
    """Delete cached features that this evaluation did not use (an older student's); returns how many."""
    stale = [entry for entry in _entries(cache) if entry.name not in used]
    for entry in stale:
        shutil.rmtree(entry)
    return len(stale)


def drop_unfinished(cache: Path) -> None:
    """Delete the files that a killed process had not finished; the caller holds the lock of the run."""
    for entry in _entries(cache):
        for file in entry.glob(".*.tmp-*"):
            file.unlink()


def _entries(cache: Path) -> list[Path]:
    return [entry for entry in cache.iterdir() if entry.is_dir()] if cache.is_dir() else []


class _Decoded:
    """Rows ready for the model, or the reason why one cannot be."""

    def __init__(self, source: ImageSource, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.preprocess = source, preprocess

    def __getitem__(self, row: int, /) -> tuple[int, Tensor | str]:
        try:
            return row, self.preprocess(self.source.load(row))
        except BadSample as error:
            return row, str(error)


def _stack(samples: list[tuple[int, Tensor | str]]) -> _Batch:
    good = [(row, value) for row, value in samples if isinstance(value, Tensor)]
    bad = {row: value for row, value in samples if isinstance(value, str)}
    pixels = torch.stack([value for _, value in good]) if good else torch.empty(0)
    return [row for row, _ in good], pixels, bad


def _too_many_bad(source: ImageSource, bad: dict[int, str]) -> UnmeasurableError:
    first = ", ".join(f"{source.name(row)} ({reason})" for row, reason in list(bad.items())[:3])
    return UnmeasurableError(
        f"{source.title}: {len(bad):,} images so far cannot be decoded, more than "
        f"{units.percent(MAX_BAD_SHARE, 0)} of {len(source):,}: {first}.",
        fix="Copy the set again from where it came from, or take these images out.",
    )


def _check_finite(model: str, source: ImageSource, rows: list[int], values: np.ndarray) -> None:
    norms = np.linalg.norm(values, axis=1)
    wrong = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(wrong):
        raise DataError(
            f"{model}: {len(wrong)} of {len(rows)} images have features that are NaN, infinite or all zero, "
            f"the first {source.name(rows[wrong[0]])}.",
            fix="The model is broken: look at its training, or load other weights.",
        )
