"""Inputs of stages that lie at addresses: embeddings, kept rows, clusters, texts; copied into the cache when needed.

These are read whole and often, by maps of files. So a stage gets a copy, of which each version is fetched once, and
whose path stands in the recipe for the address while the stage works.
"""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from clip_cid import os_errors
from clip_cid.addresses import is_remote, without_secrets
from clip_cid.data.embeddings.files_behind import is_of_embeddings
from clip_cid.errors import ClipCidError
from clip_cid.recipe import Recipe, is_list_of_keys
from clip_cid.remote import copies
from clip_cid.remote.cache import cache_folder
from clip_cid.stage_names import BALANCE, CLUSTER, EMBED, TEXTS

METADATA_BESIDE = (".npy", ".npz")
"""Files of embeddings beside which a .parquet of the same name may lie."""
_PLACES = {
    EMBED: (("embed", "existing"),),
    BALANCE: tuple(("balance", name) for name in ("existing", "grow_from", "against", "decisions", "protect")),
    CLUSTER: (("cluster", "existing"),),
    TEXTS: (("distill", "texts"),),
}


@contextlib.contextmanager
def brought_here(recipe: Recipe, stages: Collection[str]) -> Iterator[Recipe]:
    """The recipe with copies in place of the addresses that some stages take in; errors name the addresses.

    Raises:
        DataError: An input is not there, or cannot be read.
    """
    names: dict[str, str] = {}
    for section, setting in (place for stage in stages for place in _PLACES.get(stage, ())):
        settings = getattr(recipe, section)
        place = getattr(settings, setting)
        if setting == "protect":
            place = tuple(_protecting(entry, recipe.machine.cache_dir, names) for entry in place)
        else:
            place = _brought(place, recipe.machine.cache_dir, names)
        recipe = recipe.model_copy(update={section: settings.model_copy(update={setting: place})})
    try:
        yield recipe
    except ClipCidError as error:
        for copy, address in names.items():
            error.problem, error.fix = (text.replace(copy, address) for text in (error.problem, error.fix))
        error.args = (f"{error.problem}\n{error.fix}",)
        raise


def path_here(path: Path, cache_dir: Path | None) -> Path:
    """A path, or a copy of what is at the address that it was made from."""
    address = os_errors.address_of(path)
    return copy_of(address, cache_dir) if address else path


def copy_of(address: str, cache_dir: Path | None) -> Path:
    """A copy of a file or folder of embeddings, kept rows, clusters or texts.

    Raises:
        DataError: It is not there, or cannot be read.
    """
    beside = (".parquet",) if address.partition("?")[0].endswith(METADATA_BESIDE) else ()
    return copies.of_address(address, cache_folder(cache_dir), beside=beside)


def _protecting(entry: str, cache_dir: Path | None, names: dict[str, str]) -> str:
    """An entry of `balance.protect`, whose files alone are copied: a source is only named."""
    return str(_brought(entry, cache_dir, names)) if is_list_of_keys(entry) else entry


def _brought(place: Any, cache_dir: Path | None, names: dict[str, str]) -> Any:
    """A path, an address or several, with copies of what is elsewhere. Sets are left: what opens them copies them."""
    if isinstance(place, tuple):
        return tuple(str(_brought(one, cache_dir, names)) for one in place)
    if isinstance(place, dict):
        arrays = {name: where for name, where in place.items() if is_of_embeddings(where)}
        return place | {name: str(_brought(where, cache_dir, names)) for name, where in arrays.items()}
    address = os_errors.address_of(place) if isinstance(place, Path) else place
    if not is_remote(address):
        return place
    copy = copy_of(address, cache_dir)
    names[str(copy)] = without_secrets(address)
    return copy
