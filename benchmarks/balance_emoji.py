"""Does balance find the images that mean the same? On emoji of two vendors, whose true groups are known.

    python benchmarks/balance_emoji.py --data FOLDER --teacher run:runs/mixed-teacher
    python benchmarks/balance_emoji.py --data FOLDER --teacher pixels

FOLDER holds noto-*.tar and twemoji-*.tar: <key>.webp beside <key>.json with `source`, `name` and `dup`, the true group (an
emoji over all skin tones and genders). Nothing of it is copied but the few small pictures of the contact sheet.

`pixels` is 16 x 16 RGB, minus the mean image, at unit length: what can be had without a teacher. Each vendor is balanced alone,
then both together; "across" counts, in the sets of both together, only the pairs of one vendor's drawing and the other's.
Precision is told from 30 pairs on.

Writes to --out: emoji.md, emoji.csv, emoji.svg (precision and recall by threshold) and worst_merges.png: the sets with most true
groups at `--show`, the kept image framed, then one image of each other group, nearest first.
"""

import dataclasses
import json
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from clip_cid.data.pairs.images import decode_image
from clip_cid.errors import ClipCidError, DataError
from clip_cid.figures import contact_sheet, style
from clip_cid.method.balance.pair_agreement import PairAgreement, agreement
from clip_cid.method.balance.semantic_balance import Balance, balance

VENDORS = ("noto", "twemoji")
PIXELS = "pixels"
_MOST_PIXELS = 1 << 22
_SHOWN = 10
_FEWEST_PAIRS = 30  # precision of fewer is left out: it says nothing
_NOTE_CHARACTERS = 16


@dataclass(frozen=True)
class Options:
    """Which emoji, seen by which teacher."""

    data: Path
    """Folder with noto-*.tar and twemoji-*.tar."""
    teacher: str = PIXELS
    """`pixels`, or a teacher: run:PATH, local-dir:PATH, hf-hub:ORG/NAME, or NAME/TAG of open_clip."""
    thresholds: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.15, 0.20, 0.30)
    """Cosine distances."""
    show: float | None = None
    """Threshold of the contact sheet; by default the one with the best F1 of both vendors together."""
    sets: int = 8
    """Sets on the contact sheet."""
    out: Path = Path("runs/balance-emoji")
    """Where the results go."""
    device: str = "cpu"
    """Of the teacher."""


@dataclass(frozen=True)
class Emoji:
    """One drawing."""

    vendor: str
    name: str
    group: str
    image: bytes

    def picture(self) -> Image.Image:
        return decode_image(self.image, max_pixels=_MOST_PIXELS)


@dataclass(frozen=True)
class Line:
    """Sets at one threshold against the true groups."""

    rows_of: str
    threshold: float
    removed: float
    precision: float
    recall: float
    f1: float
    set_pairs: int
    true_pairs: int
    shared_pairs: int
    most_groups: int
    """True groups in the set that has most of them."""


def main(options: Options) -> None:
    emoji = read(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    vectors = pixel_vectors(emoji) if options.teacher == PIXELS else teacher_vectors(emoji, options)
    vendor, group = (np.array([getattr(one, field) for one in emoji]) for field in ("vendor", "group"))

    # Each vendor alone, both together, and of both the pairs across.
    lines: list[Line] = []
    together: dict[float, Balance] = {}
    thresholds = {*options.thresholds} | ({options.show} if options.show is not None else set[float]())
    for threshold in sorted(thresholds):
        for name in VENDORS:
            rows = np.flatnonzero(vendor == name)
            found = balance(vectors[rows], threshold=threshold)
            lines.append(_line(name, found, agreement(found.set_of, group[rows]), group[rows]))
        found = together[threshold] = balance(vectors, threshold=threshold)
        lines.append(_line("both", found, agreement(found.set_of, group), group))
        lines.append(_line("across", found, across(found.set_of, group, vendor), group))

    best = max((line for line in lines if line.rows_of == "both"), key=lambda line: line.f1)
    show = best.threshold if options.show is None else options.show
    text = table(lines, emoji, options) + "\n" + worst_merges(together[show], vectors, emoji, options)
    (options.out / "emoji.md").write_text(text)
    names = [field.name for field in dataclasses.fields(Line)]
    style.write_csv(options.out / "emoji.csv", {name: [getattr(line, name) for line in lines] for name in names})
    draw(lines, options.out / "emoji.svg")
    print(text)


def read(folder: Path) -> list[Emoji]:
    """Every drawing of the tars, in the order of their names.

    Raises:
        DataError: Tars are missing, or one has an image without the fields needed here.
    """
    found: list[Emoji] = []
    for vendor in VENDORS:
        tars = sorted(folder.glob(f"{vendor}-*.tar"))
        if not tars:
            raise DataError(
                f"{folder}: no {vendor}-*.tar there.",
                fix="Give --data a folder with noto-*.tar and twemoji-*.tar (images with a json that has `dup`).",
            )

        for path in tars:
            with tarfile.open(path) as tar:
                files = {member.name: handle.read() for member in tar if (handle := tar.extractfile(member))}
            for name in (name for name in files if name.endswith(".webp")):
                fields = json.loads(files.get(name.removesuffix(".webp") + ".json", b"{}"))
                if missing := [field for field in ("source", "name", "dup") if not fields.get(field)]:
                    raise DataError(
                        f"{path}: the json of {name} lacks {', '.join(missing)}.",
                        fix="Use the tars of the layout above.",
                    )
                found.append(Emoji(fields["source"], fields["name"], fields["dup"], files[name]))
    return found


def pixel_vectors(emoji: Sequence[Emoji]) -> np.ndarray:
    """16 x 16 RGB without the mean image, at unit length."""
    small = [one.picture().resize((16, 16), Image.Resampling.BOX) for one in emoji]
    values = np.stack([np.asarray(image, dtype=np.float64).ravel() for image in small])
    return _unit(values - values.mean(axis=0))


def teacher_vectors(emoji: Sequence[Emoji], options: Options) -> np.ndarray:
    """The teacher's image embeddings, as the embed stage computes and stores them."""
    import torch

    from clip_cid.models.teacher import load_teacher
    from clip_cid.recipe import EmbedConfig

    name, _, tag = options.teacher.rpartition("/")
    plain = ":" not in options.teacher and name != ""
    settings = EmbedConfig(teacher=name, pretrained=tag) if plain else EmbedConfig(teacher=options.teacher)
    teacher = load_teacher(settings, device=options.device)
    vectors = []
    for start in range(0, len(emoji), 128):
        images = torch.stack([teacher.clip.preprocess(one.picture()) for one in emoji[start : start + 128]])
        vectors.append(teacher.encode_images(images).cpu().numpy().astype(np.float16))
    return np.concatenate(vectors)


def across(set_of: np.ndarray, group: np.ndarray, vendor: np.ndarray) -> PairAgreement:
    """As `agreement`, of pairs of two vendors only: all pairs less those of one vendor."""
    _, number = np.unique(vendor, return_inverse=True)
    every = agreement(set_of, group)
    one = agreement(set_of * len(VENDORS) + number, np.char.add(np.char.add(vendor, ":"), group))
    found, true, shared = (
        getattr(every, name) - getattr(one, name) for name in ("set_pairs", "true_pairs", "shared_pairs")
    )
    return PairAgreement(
        precision=shared / found if found else 1.0,
        recall=shared / true if true else 1.0,
        rows=every.rows,
        set_pairs=found,
        true_pairs=true,
        shared_pairs=shared,
    )


def _line(rows_of: str, found: Balance, agreed: PairAgreement, group: np.ndarray) -> Line:
    both = agreed.precision + agreed.recall
    return Line(
        rows_of=rows_of,
        threshold=found.threshold,
        removed=found.removed_share,
        precision=agreed.precision,
        recall=agreed.recall,
        f1=2 * agreed.precision * agreed.recall / both if both else 0.0,
        set_pairs=agreed.set_pairs,
        true_pairs=agreed.true_pairs,
        shared_pairs=agreed.shared_pairs,
        most_groups=int(_groups_in_sets(found.set_of, group).max()),
    )


def _groups_in_sets(set_of: np.ndarray, group: np.ndarray) -> np.ndarray:
    _, number = np.unique(group, return_inverse=True)
    return np.bincount(np.unique(np.stack([set_of, number]), axis=1)[0])


def table(lines: Sequence[Line], emoji: Sequence[Emoji], options: Options) -> str:
    counts = ", ".join(f"{sum(one.vendor == name for one in emoji):,} of {name}" for name in VENDORS)
    text = [
        f"{len(emoji):,} emoji ({counts}), {len({one.group for one in emoji}):,} true groups, seen by {options.teacher}.",
        "",
        "| cosine distance | removed: noto | twemoji | both | precision: noto | twemoji | both | across"
        " | recall: noto | twemoji | both | across | most groups in a set |",
        "|" + "---|" * 13,
    ]
    for threshold in dict.fromkeys(line.threshold for line in lines):
        of = {line.rows_of: line for line in lines if line.threshold == threshold}
        cells = [f"{threshold:g}", *(f"{of[name].removed:.3f}" for name in (*VENDORS, "both"))]
        cells += [f"{line.precision:.3f}" if line.set_pairs >= _FEWEST_PAIRS else "-" for line in of.values()]
        cells += [f"{line.recall:.3f}" for line in of.values()]
        text.append("| " + " | ".join([*cells, f"{of['both'].most_groups:,}"]) + " |")
    return "\n".join(text) + "\n"


def worst_merges(found: Balance, vectors: np.ndarray, emoji: Sequence[Emoji], options: Options) -> str:
    """Draw the sets with most true groups; returns a line that says what was drawn."""
    groups = _groups_in_sets(found.set_of, np.array([one.group for one in emoji]))
    worst = [int(set_) for set_ in np.argsort(-groups, kind="stable")[: options.sets] if groups[set_] > 1]
    unit = _unit(vectors.astype(np.float64))

    # A strip a set: the kept drawing, and of every other group the one nearest it.
    strips = []
    for set_ in worst:
        members, kept = np.flatnonzero(found.set_of == set_), int(found.kept[set_])
        distance = (1 - unit[members] @ unit[kept]).tolist()
        nearest: dict[str, tuple[int, float]] = {emoji[kept].group: (kept, 0.0)}
        for far, row in sorted(zip(distance, members.tolist(), strict=True)):
            nearest.setdefault(emoji[row].group, (row, far))
        shown = list(nearest.values())
        label = f"{len(members):,} images of {groups[set_]:,} groups; kept: {emoji[kept].name} ({emoji[kept].vendor})"
        if len(shown) > _SHOWN:  # the near half, and the far end of the chain
            shown = shown[: _SHOWN // 2] + shown[-(_SHOWN - _SHOWN // 2) :]
            label += f"; the {_SHOWN // 2} nearest groups and the {_SHOWN - _SHOWN // 2} farthest"
        strips.append(
            contact_sheet.Strip(
                label,
                [str(row) for row, _ in shown],
                [f"{far:.3f} {emoji[row].name}"[:_NOTE_CHARACTERS] for row, far in shown],
                framed=(0,),
            )
        )

    if not strips:
        return f"At {found.threshold:g} no set has two true groups: no contact sheet.\n"
    picture: Callable[[str], Image.Image] = lambda key: emoji[int(key)].picture()  # noqa: E731
    contact_sheet.draw(strips, picture, options.out / "worst_merges.png")
    return (
        f"worst_merges.png: the {len(strips)} sets with most true groups at {found.threshold:g}, of"
        f" {int((groups > 1).sum()):,} sets with more than one.\n"
    )


def draw(lines: Sequence[Line], path: Path) -> None:
    """Precision and recall against the threshold, a panel for each vendor and one for pairs across."""
    panels = {"noto": "noto alone", "twemoji": "twemoji alone", "across": "across vendors"}
    with style.new_figure(2.6, width=1.4 * style.WIDTH) as figure:
        for axes, (name, label) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
            some = [line for line in lines if line.rows_of == name]
            thresholds = [line.threshold for line in some]
            told = [line for line in some if line.set_pairs >= _FEWEST_PAIRS]
            for color, what, these in ((style.BLUE, "precision", told), (style.VERMILLION, "recall", some)):
                values = [getattr(line, what) for line in these]
                axes.plot([line.threshold for line in these], values, color=color, marker="o", markersize=3, label=what)
            axes.set(xscale="log", xlabel=f"cosine distance, {label}", ylim=(-0.02, 1.02))
            axes.set_xticks([tick for tick in (0.01, 0.03, 0.1, 0.3) if min(thresholds) <= tick <= max(thresholds)])
            axes.xaxis.set_major_formatter(style.plain_ticks())
            axes.minorticks_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        style.save_svg(figure, path)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ClipCidError as error:
        sys.exit(f"{error.problem}\n{error.fix}")
