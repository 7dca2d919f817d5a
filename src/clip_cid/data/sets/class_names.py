"""The words for a user's own classes: WordNet ids are looked up, and names that are no words are said."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clip_cid import log
from clip_cid.data.sets.known_sets import IMAGENET, few, load_prompts
from clip_cid.data.sets.readers.class_list import HOW_TO_NAME

_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"((class|cls|label|category|cat|id|c)[ _.-]*)?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """The names that classes are prompted by."""

    names: tuple[str, ...]
    note: str = ""
    """Said of every result: how the names came to be, or what is wrong with them."""
    nameless: tuple[str, ...] = ()
    """WordNet ids that have no name here: zero-shot would prompt with the ids."""


def words_of(name: str, names: Sequence[str], file: Path) -> Words:
    """Names in words, with WordNet ids looked up; names that are mere numbers, or that classes share, are warned of.

    Args:
        name: The set's, for messages.
        names: As the files of the set call its classes.
        file: Where its names can be written.
    """
    notes: list[str] = []
    ids = [text for text in names if _WORDNET_ID.fullmatch(text)]
    known = _wordnet_names() if ids else {}
    if ids:
        notes.append(f"{len(ids)} of {len(names)} classes are named by their WordNet ids")
        log.info(f"{name}: {notes[-1]}: {few([' is '.join((text, known.get(text, 'unknown'))) for text in ids])}")

    numbers = [text for text in names if _NUMBER.fullmatch(text)]
    if 2 * len(numbers) > len(names):
        notes.append(f"{len(numbers)} of {len(names)} classes are named by numbers ({few(numbers)})")
        log.warn(f"{name}: {notes[-1]}, which zero-shot prompts with. {HOW_TO_NAME.format(file)}")

    words = tuple(known.get(text, text) for text in names)
    if shared := [text for text in dict.fromkeys(words) if words.count(text) > 1]:
        notes.append(f"classes share a name ({few(shared)})")
        log.warn(f"{name}: {notes[-1]}, so zero-shot cannot tell them apart. {HOW_TO_NAME.format(file)}")
    return Words(words, "; ".join(notes), tuple(text for text in ids if text not in known))


@cache
def _wordnet_names() -> dict[str, str]:
    """WordNet id -> name: ImageNet's as CLIP prompts them, the others' first word in WordNet."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    others = {wnid: info.label_name_to_description(wnid).partition(",")[0] for wnid in info.label_names()}
    return others | dict(load_prompts(IMAGENET).names)
