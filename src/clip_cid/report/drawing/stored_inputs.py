"""The embeddings and the balance behind figures, opened when a figure asks for them; no model is loaded."""

from functools import cached_property
from pathlib import Path

import numpy as np

from clip_cid.data.balance.decided_file import read_cut
from clip_cid.data.balance.forest_file import FOREST_FILE, StoredForest, read_forest
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_array_of_stage
from clip_cid.data.pairs.pictures import NoPicturesError, Pictures, open_pictures
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE, EMBED

_NO_TEACHER = "this recipe has no teacher"
_NO_BALANCE = "this recipe does not balance"
_NOT_KNOWN = "no image is known to be removed for another"


class LeftOut(Exception):
    """A figure has no input in this run; the message says which."""


class StoredInputs:
    """What the stages embed and balance have stored; what is missing raises `LeftOut` with the reason."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe

    def of_stage(self, stage: str, unused: str) -> Path:
        """The folder of a finished stage; `unused` is the reason where the recipe does not have it."""
        if not self.recipe.uses(stage):
            raise LeftOut(unused)
        if not self.folder.has(stage):
            raise LeftOut(f"{stage} has not run")
        return self.folder.stage(stage)

    @cached_property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.of_stage(EMBED, _NO_TEACHER))

    @cached_property
    def kept(self) -> np.ndarray:
        """The rows of the store that the clusters and the student see."""
        if not self.recipe.uses(BALANCE):
            return np.flatnonzero(self.store.ok)
        return read_array_of_stage(self.of_stage(BALANCE, _NO_BALANCE) / "kept.npy")

    @cached_property
    def balanced(self) -> BalanceTables:
        """The sets of the balance stage."""
        folder = self.of_stage(BALANCE, _NO_BALANCE)
        if not BalanceTables.exist(folder):
            raise LeftOut(_NOT_KNOWN)
        return BalanceTables(folder)

    @cached_property
    def removed(self) -> BalanceTables:
        """The same, if at least one image was removed."""
        if not len(self.balanced.distances):
            raise LeftOut(_NOT_KNOWN)
        return self.balanced

    @cached_property
    def forest(self) -> StoredForest:
        """The forest of the balance; its links name rows of the store."""
        folder = self.of_stage(BALANCE, _NO_BALANCE)
        if not BalanceTables.exist(folder):
            raise LeftOut(_NOT_KNOWN)
        return read_forest(folder / FOREST_FILE)

    @cached_property
    def joined_forest(self) -> StoredForest:
        """The forest without the links that decisions cut."""
        forest, cut = self.forest, read_cut(self.folder.stage(BALANCE))
        if not len(cut):
            return forest
        left, right, squared = (np.delete(column, cut) for column in (forest.left, forest.right, forest.squared))
        return forest._replace(left=left, right=right, squared=squared)

    def words(self, rows: list[int]) -> tuple[dict[int, str], dict[int, str]]:
        """Key and captions of each row."""
        distinct = sorted(set(rows))
        captions = {row: " / ".join(self.store.captions(row)) for row in distinct}
        return dict(zip(distinct, self.store.keys_of(distinct), strict=True)), captions

    def pictures(self, keys: dict[int, str]) -> Pictures:
        try:
            return open_pictures(self.folder, self.recipe, {key: row for row, key in keys.items()})
        except NoPicturesError as reason:
            raise LeftOut(str(reason)) from reason
