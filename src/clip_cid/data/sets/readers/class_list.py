"""A classnames.txt beside class folders: which line names which folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from clip_cid import log
from clip_cid.data.sets.known_sets import few
from clip_cid.data.sets.readers.layout_parts import lines
from clip_cid.errors import DataError

HOW_TO_NAME = "Write the class names to {}, one a line: in the sorted order of the class folders, or `FOLDER<tab>NAME`."


def names_beside(file: Path, folders: Sequence[str], name: str) -> tuple[str, ...]:
    """The names in a classnames.txt, in the order of the class folders; none if there is no such file.

    Lines without a tab go by the sorted folders. Folders 0 to N - 1, or 1 to N, go by number; for other numbers the two
    orders must agree.

    Raises:
        DataError: The lines and the folders do not fit.
    """
    if not file.exists():
        return ()
    named = lines(file)
    if len(named) != len(folders):
        raise DataError(
            f"{file}: {len(named)} class names, but there are {len(folders)} class folders ({few(folders)}).",
            fix=HOW_TO_NAME.format(file),
        )

    if any("\t" in line for line in named):
        names = _by_folder(file, dict(_folder_and_name(line) for line in named), folders)
    elif sorted(_plain(line) for line in named) == sorted(_plain(folder) for folder in folders):
        names = _by_folder(file, {_plain(line): line for line in named}, [_plain(folder) for folder in folders])
    else:
        names = _by_place(file, named, folders)
    shown = few([f"{folder} is {text}" for folder, text in zip(folders, names, strict=True)])
    log.info(f"{name}: class names from {file.name}: {shown}")
    return names


def _folder_and_name(line: str) -> tuple[str, str]:
    folder, _, name = line.partition("\t")
    return folder.strip(), name.strip()


def _by_folder(file: Path, names: dict[str, str], folders: Sequence[str]) -> tuple[str, ...]:
    if wrong := [*sorted(set(names) ^ set(folders)), *(folder for folder, text in names.items() if not text)]:
        raise DataError(
            f"{file}: {wrong[0]!r} is not both a class folder and a line that names it.",
            fix=HOW_TO_NAME.format(file),
        )
    return tuple(names[folder] for folder in folders)


def _by_place(file: Path, named: Sequence[str], folders: Sequence[str]) -> tuple[str, ...]:
    order = _order(file, folders)
    names = dict(zip(order, named, strict=True))
    places = {_plain(folder): folder for folder in folders}
    for number, (folder, line) in enumerate(names.items(), start=1):
        other = places.get(_plain(line), folder)
        if other != folder:
            raise DataError(
                f"{file}: line {number} is {line!r}, which is the folder {other}, but it would name the folder"
                f" {folder}.",
                fix=HOW_TO_NAME.format(file),
            )
    return tuple(names[folder] for folder in folders)


def _order(file: Path, folders: Sequence[str]) -> list[str]:
    """The folders in the order of the lines.

    Raises:
        DataError: They are numbered so that sorted as texts and as numbers they are in different orders.
    """
    by_text, by_number = sorted(folders), sorted(folders, key=_natural)
    if by_text == by_number:
        return by_text
    for first in (0, 1):
        if set(folders) == {str(number) for number in range(first, first + len(folders))}:
            return by_number
    place = next(place for place, folder in enumerate(by_text) if folder != by_number[place])
    raise DataError(
        f"{file}: line {place + 1} may name the folder {by_text[place]} or the folder {by_number[place]}, by the order"
        " of texts or of numbers.",
        fix="Write each line as `FOLDER<tab>NAME`, or give the folders leading zeros.",
    )


def _natural(folder: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", folder)
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]


def _plain(text: str) -> str:
    return text.casefold().replace("_", " ")
