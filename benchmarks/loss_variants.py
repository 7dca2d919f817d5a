"""Students of one recipe with other losses and settings, beside each other: how the preset `best` was chosen.

    python benchmarks/loss_variants.py recipes/mixed-choice.yaml OUT cid=clip-cid 'text 30=clip-cid+cosine_text:30'
    python benchmarks/loss_variants.py --seeds 5 recipes/mixed.yaml OUT \
        'best=best' 'class names=best;texts=[data/mixed-names.txt]'

A variant is LABEL=PRESET[+LOSS:WEIGHT ...][;SETTING=VALUE ...], where PRESET may be `none`, and a setting without a
section is one of distill. OUT is that of `clip-cid ablate`: run folders, a table, and paired differences of the same
seeds to the first variant. `--table` prints means over sets of the finished runs of some OUT folders instead, with
Student's t: the sets that CLIP's paper has and all others count alike there.
"""

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from clip_cid import log
from clip_cid.ablations.runs import run
from clip_cid.ablations.variants import Ablation, Variant
from clip_cid.figures.ablation import Estimate
from clip_cid.recipe import PRESETS, LossWeights, read_recipe

Scores = Mapping[str, float]
"""Column -> percent."""

_TASKS = {"zero_shot": "zero-shot", "linear_probe": "probe", "knn": "neighbors", "retrieval": "retrieval"}
_LEFT_OUT = "digits"  # of scikit-learn: no photographs


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train, or which finished runs to print."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """RECIPE OUT VARIANT ..., or with --table OUT ..."""
    seeds: int = 1
    table: bool = False
    against: str = ""
    """With --table: the label whose scores of the same seeds are taken off."""


def variant(text: str) -> Variant:
    """LABEL=PRESET[+LOSS:WEIGHT ...][;SETTING=VALUE ...]."""
    label, _, rest = text.partition("=")
    losses, *settings = rest.split(";")
    preset, *added = losses.split("+")
    weights = dict.fromkeys(LossWeights.model_fields, 0.0) if preset == "none" else dict(PRESETS[preset].weights)
    for loss in added:
        name, _, weight = loss.partition(":")
        if name not in weights:
            raise SystemExit(f"no loss named {name}; there are {', '.join(weights)}")
        weights[name] = float(weight)
    changes: dict[str, Any] = {"distill.weights": weights}
    if preset in PRESETS:
        changes |= {f"distill.{name}": value for name, value in PRESETS[preset].settings.items()}
    for setting in settings:
        name, _, value = setting.partition("=")
        changes[name if "." in name else f"distill.{name}"] = yaml.safe_load(value)
    return Variant(label, changes)


def scores(results: Path) -> Scores:
    """Means over the sets of a finished run; retrieval is the mean of a set's recalls, over the sets."""
    of_sets: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text().splitlines():
        found = json.loads(line)
        if found["model"] == "student" and found["set"] != _LEFT_OUT and found["task"] in _TASKS:
            of_sets[_TASKS[found["task"]]][found["set"]].append(100 * found["score"])
    means = {task: statistics.mean(map(statistics.mean, sets.values())) for task, sets in of_sets.items()}
    if "cifar10" in of_sets["zero-shot"]:
        means["zero-shot, cifar10"] = statistics.mean(of_sets["zero-shot"]["cifar10"])
    return means


def print_table(folders: Sequence[Path], against: str) -> None:
    """A row a label: the mean over its seeds, and half the 95 % interval."""
    runs: dict[str, dict[str, Scores]] = defaultdict(dict)
    for results in sorted(path for folder in folders for path in folder.glob("runs/*/evaluate/results.jsonl")):
        label, _, seed = results.parents[1].name.rpartition("-seed")
        runs[label][seed] = scores(results)
    if not runs or (against and against not in runs):
        raise SystemExit(f"no finished run of {against or 'any variant'}; there are {', '.join(runs) or 'none'}")
    every = [one for seeds in runs.values() for one in seeds.values()]
    columns = [name for name in every[0] if all(name in one for one in every)]
    print("| variant | seeds | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    for label, seeds in runs.items():
        if against and label == against:
            continue
        shared = [seed for seed in seeds if not against or seed in runs[against]]
        cells = [
            _words([seeds[seed][name] - (runs[against][seed][name] if against else 0) for seed in shared])
            for name in columns
        ]
        print(f"| {label}{f' - {against}' if against else ''} | {len(shared)} | " + " | ".join(cells) + " |")


def _words(values: Sequence[float]) -> str:
    if not values:
        return "-"
    found = Estimate.of(values)
    return f"{found.mean:.1f}" if found.half is None else f"{found.mean:.1f} ± {found.half:.1f}"


def main(options: Options) -> None:
    """Train what is missing, or print what is there."""
    if options.table:
        print_table([Path(path) for path in options.paths], options.against)
        return
    recipe, out, *texts = options.paths
    log.setup()
    variants = tuple(variant(text) for text in texts)
    ablation = Ablation("losses", variants, reference=variants[0].label)
    run(ablation, read_recipe(Path(recipe)), Path(out), seeds=options.seeds)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
