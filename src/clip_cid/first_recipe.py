"""A recipe to begin with: numbers that fit so many pairs and GPUs, each with the reason, or one that comes with us."""

from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from typing import Any

from clip_cid import auto_numbers, units
from clip_cid.auto_numbers import LONGEST_WARMUP, PAPER_BATCH, PAPER_CENTERS, PAPER_EPOCHS, Choice
from clip_cid.errors import ConfigError
from clip_cid.recipe import Recipe, commented_recipe, parse_recipe

_FEWEST_PAIRS = 32  # for each GPU, so that an epoch has a few batches
_KEPT = 0.5  # of the pairs, at least; the paper keeps 0.563
_BATCH_OF_CPU = 256
_SEEN_BY_GPU, _SEEN_BY_CPU = 100_000_000, 1_000_000  # pairs
_LARGE_BATCH = 8_192


def short_recipe(pairs: int, gpus: int) -> str:
    """A recipe of the settings that depend on the data or the machine.

    Raises:
        ConfigError: There are too few pairs, or fewer than no GPUs.
    """
    chosen = choose(pairs, gpus)
    lines = [
        f"# For {units.counted(pairs, 'pair')} and {_named(gpus)}. All other settings: clip-cid init --all.",
        "# The numbers hold as long as balance keeps half of the pairs or more.",
        "pairs:",
        "  source: []  # your pairs: tars, tables, or folders of images with .txt files",
    ]
    for section, of_section in groupby(chosen, key=lambda choice: choice.setting.partition(".")[0]):
        lines.append(f"{section}:")
        lines += [
            f"  {choice.setting.partition('.')[2]}: {_as_yaml(choice.value)}  # {choice.why}" for choice in of_section
        ]
    return "\n".join([*lines, ""])


def shipped_recipe(name: str) -> str:
    """The recipe of this name that comes with the package, with its comments.

    Raises:
        ConfigError: There is none.
    """
    folder = resources.files("clip_cid") / "recipes"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"--from: there is no recipe {name!r}.", fix=f"Give one of: {', '.join(names)}.")
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def full_recipe(pairs: int, gpus: int) -> str:
    """Every setting with its explanation, and the reasons of those that were chosen."""
    chosen = choose(pairs, gpus)
    values: dict[str, dict[str, Any]] = {}
    for choice in chosen:
        section, _, name = choice.setting.partition(".")
        values.setdefault(section, {})[name] = choice.value
    recipe = parse_recipe(values, where="init")
    return commented_recipe(recipe, reasons={choice.setting: choice.why for choice in chosen})


def choose(pairs: int, gpus: int) -> list[Choice]:
    """The settings for so many pairs, in the order of the recipe.

    Raises:
        ConfigError: There are too few pairs, or fewer than no GPUs.
    """
    if gpus < 0:
        raise ConfigError(f"--gpus: must be at least 0, got {gpus:,}.", fix="Give 0 to train on the CPU.")
    if pairs < (least := _FEWEST_PAIRS * max(1, gpus)):
        fewer = ", or fewer GPUs" if gpus > 1 else ""
        raise ConfigError(f"--pairs: {pairs:,} are too few for {_named(gpus)}.", fix=f"Give at least {least:,}{fewer}.")

    kept = int(_KEPT * pairs)
    centers, batch = auto_numbers.num_centers(kept), _batch_size(kept, gpus)
    epochs = _epochs(kept, gpus)
    steps = epochs * kept // batch

    return [
        *_models(gpus),
        Choice("balance.threshold", 0.07, "the paper's; `clip-cid balance RUN --sweep` shows what others remove"),
        _why_centers(kept, centers),
        _student(gpus),
        _why_epochs(kept, epochs, gpus),
        _why_batch(kept, batch, gpus),
        Choice("distill.weights", "best", "ahead in zero-shot and neighbors; `clip-cid` has the paper's losses alone"),
        *_learning_rate(batch, gpus),
        _why_warmup(steps),
        *_sampling(centers, batch),
        *_machine(gpus),
    ]


def _models(gpus: int) -> Iterator[Choice]:
    if gpus:
        yield Choice(
            "embed.teacher", "ViT-L-14", "fits a GPU of 24 GB; ViT-bigG-14 (laion2b_s39b_b160k) is the paper's"
        )
        yield Choice("embed.pretrained", "laion2b_s32b_b82k", "its weights, by the tag of open_clip")
    else:
        yield Choice("embed.teacher", "ViT-B-32", "a forward pass that a CPU can afford; ViT-L-14 knows more")
        yield Choice("embed.pretrained", "laion2b_s34b_b79k", "its weights, by the tag of open_clip")


def _student(gpus: int) -> Choice:
    if gpus:
        return Choice("distill.student", "ViT-B-32", "the paper's smaller one")
    return Choice("distill.student", "cid-small", "small enough for a CPU; ViT-B-32 takes a GPU")


def _why_centers(kept: int, centers: int) -> Choice:
    why = f"{kept // centers:,} images a cluster or more"
    return Choice("cluster.num_centers", centers, f"the paper's: {why}" if centers == PAPER_CENTERS else why)


def _batch_size(kept: int, gpus: int) -> int:
    most = min(auto_numbers.BATCH, PAPER_BATCH // gpus) if gpus else _BATCH_OF_CPU
    return auto_numbers.batch_size(kept, most=most, ranks=max(1, gpus))


def _why_batch(kept: int, batch: int, gpus: int) -> Choice:
    steps = f"at least {kept // batch:,} steps an epoch"
    each = f"{batch // gpus:,} a GPU" if gpus else "what a CPU can do in a step"
    return Choice("distill.batch_size", batch, f"{each}; {steps}; larger is better, and takes memory")


def _epochs(kept: int, gpus: int) -> int:
    return auto_numbers.epochs(kept, seen=_SEEN_BY_GPU * gpus if gpus else _SEEN_BY_CPU)


def _why_epochs(kept: int, epochs: int, gpus: int) -> Choice:
    if epochs == PAPER_EPOCHS:
        why = "the paper's"
    elif epochs == auto_numbers.FEWEST_EPOCHS:
        why = f"{epochs * kept:,} pairs seen or more: long for {_named(gpus)}"
    else:
        why = f"{epochs * kept:,} pairs seen or more, a fair load of {_named(gpus)}; the paper has 32"
    return Choice("distill.epochs", epochs, f"{why}; `clip-cid check` tells the hours")


def _learning_rate(batch: int, gpus: int) -> Iterator[Choice]:
    if gpus and batch < _LARGE_BATCH:
        yield Choice("distill.lr", 5e-4, f"for batches of {batch:,}; the paper's 1e-3 is for 32,768")


def _why_warmup(steps: int) -> Choice:
    warmup = auto_numbers.warmup_steps(steps)
    why = "usual for long runs" if warmup == LONGEST_WARMUP else "a tenth"
    return Choice("distill.warmup_steps", warmup, f"{why}, of {steps:,} steps or more")


def _sampling(centers: int, batch: int) -> Iterator[Choice]:
    usual = Recipe().distill.sample_rate
    if round(usual * centers) <= batch:
        yield Choice(
            "distill.sample_rate",
            1.0,
            f"so few centers all take part: a batch alone may have more than {usual:g} of them",
        )


def _machine(gpus: int) -> Iterator[Choice]:
    if gpus:
        yield Choice("machine.workers", 8, "processes that decode images for one GPU; no more than it has cores")


def _named(gpus: int) -> str:
    return units.counted(gpus, "GPU") if gpus else "a CPU"


def _as_yaml(value: Any) -> str:
    return f"{value:_}" if isinstance(value, int) else f"{value:.1e}" if value == 5e-4 else str(value)
