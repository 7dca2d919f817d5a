"""What `clip-cid embed` costs beside the teacher's two forward passes alone.

    python benchmarks/embed_speed.py                                             ViT-B/32 at 224 px, CPU
    python benchmarks/embed_speed.py --teacher cid-conv --pairs 2000 10000       a small teacher
    python benchmarks/embed_speed.py --device cuda --teacher ViT-L-14 --precision bf16 --pairs 2048 20480 --workers 15

A teacher with random weights, and made-up JPEG photographs of 500 x 375 with a caption of ten words. Each run is a
process of its own; runs take turns within a round: the whole command on few and on many pairs, and the forwards on
batches of as many that lie in memory, preprocessed and tokenized. What a pair costs beyond the start (imports, the
teacher, the index, the first batch) is the difference of two runs over the difference of their pairs. The share is of
rates: 1 where the command takes nothing beside the forwards. Wall clock, as decoding and the forwards run at once;
CPU seconds of all processes beside it, which other work on the machine hardly changes.
"""

import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import yaml
from PIL import Image
from process_costs import cpu_seconds, machine

_PHOTOS, _SHARD = 64, 1000
_WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "dog",
    "cat",
    "house",
    "tree",
    "river",
    "on",
    "under",
    "near",
    "a",
    "the",
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    teacher: str = "ViT-B-32"
    """An architecture of open_clip or of clip-cid."""
    pairs: tuple[int, int] = (64, 256)
    """Few and many."""
    rounds: int = 3
    batch: int = 64
    """machine.embed_batch."""
    workers: int = 1
    """machine.workers: processes that decode."""
    threads: int = 0
    """Of PyTorch; its own choice when 0."""
    device: str = "cpu"
    precision: str = "fp32"
    work: Path = Path("data/embed-speed")
    """Teacher and pairs."""
    out: Path | None = None
    """JSON of all numbers."""
    apart: bool = True
    """Whether each run is a process of its own; if not, runs that do not count come first."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run took, from its first import on if it is a process of its own."""

    pairs: int
    wall: float
    cpu: float


def make(options: Options) -> None:
    """The teacher and the pairs, if they are not there yet."""
    from clip_cid.models.export import export_student
    from clip_cid.models.student import build_student

    options.work.mkdir(parents=True, exist_ok=True)
    teacher = options.work / "teacher"
    if not teacher.is_dir():
        export_student(build_student(options.teacher, embed_dim=None, seed=0), teacher, head_state={}, provenance={})
    for count in options.pairs:
        if not (folder := options.work / f"pairs-{count}").is_dir():
            _write_pairs(folder, count)
    recipe = {
        "embed": {"teacher": f"local-dir:{teacher.absolute()}", "precision": options.precision},
        "machine": {"device": options.device, "embed_batch": options.batch, "workers": options.workers},
    }
    if options.threads:
        recipe["machine"]["threads"] = options.threads
    (options.work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _write_pairs(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    photos = [_photo(random) for _ in range(min(_PHOTOS, count))]
    folder.mkdir()
    for start in range(0, count, _SHARD):
        with tarfile.open(folder / f"{start // _SHARD:05d}.tar", "w") as tar:
            for number in range(start, min(start + _SHARD, count)):
                caption = " ".join(random.choice(_WORDS, 10))
                for kind, content in (("jpg", photos[number % len(photos)]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _photo(random: np.random.Generator) -> bytes:
    """Smooth shapes and grain; about as many bytes as a photograph has."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = random.normal(0, 6, (375, 500, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def measure(options: Options) -> dict[str, list[Run]]:
    """Runs of the command and of the forwards; they take turns."""
    make(options)
    runs: dict[str, list[Run]] = {"embed": [], "forwards": []}
    if not options.apart:
        for name in runs:
            run_job(name, options.pairs[0], options)
    for number in range(options.rounds):
        for count in options.pairs:
            for name in list(runs)[:: 1 if number % 2 else -1]:
                run = _in_a_process if options.apart else run_job
                runs[name].append(run(name, count, options))
    return runs


def _in_a_process(name: str, count: int, options: Options) -> Run:
    job = json.dumps([name, count, dataclasses.asdict(options)], default=str)
    # As the command itself does: threads that spin would count as CPU seconds.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--job", job]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def run_job(name: str, count: int, options: Options) -> Run:
    """In this process."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    (_embed if name == "embed" else _forwards)(count, options)
    return Run(count, time.perf_counter() - wall, cpu_seconds() - cpu)


def _embed(count: int, options: Options) -> None:
    from clip_cid import cli

    run = options.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    source = f"{options.work / f'pairs-{count}'}/*.tar"
    if status := cli.main(["embed", f"{run}", "--recipe", f"{options.work / 'recipe.yaml'}", "--pairs.source", source]):
        raise SystemExit(status)


def _forwards(count: int, options: Options) -> None:
    import torch

    from clip_cid.models.teacher import load_teacher
    from clip_cid.recipe import EmbedConfig

    if options.threads:
        torch.set_num_threads(options.threads)
    settings = EmbedConfig.model_validate(
        {"teacher": f"local-dir:{(options.work / 'teacher').absolute()}", "precision": options.precision}
    )
    teacher = load_teacher(settings, device=options.device)
    model: Any = teacher.clip.model
    size = min(options.batch, count)
    images = torch.rand(size, 3, teacher.image_side, teacher.image_side, device=teacher.device)
    texts = teacher.clip.tokenizer([" ".join(_WORDS[:10])] * size).to(teacher.device)
    with teacher._arithmetic():
        for start in range(0, count, size):
            some = min(size, count - start)
            model.encode_image(images[:some])
            model.encode_text(texts[:some])
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()


def beyond_start(runs: list[Run], options: Options) -> tuple[float, float]:
    """Seconds a pair beyond the start, of wall clock and of CPUs: medians over the rounds."""
    few, many = ([run for run in runs if run.pairs == count] for count in options.pairs)
    more = options.pairs[1] - options.pairs[0]
    wall = statistics.median((large.wall - small.wall) / more for small, large in zip(few, many, strict=True))
    cpu = statistics.median((large.cpu - small.cpu) / more for small, large in zip(few, many, strict=True))
    return wall, cpu


def share(each: dict[str, tuple[float, float]], *, of: int = 0) -> float:
    """The command's rate as a share of the forwards': of wall clock (0) or of CPUs (1)."""
    return each["forwards"][of] / each["embed"][of]


def main(options: Options) -> None:
    """Measure, and print a table."""
    runs = measure(options)
    each = {name: beyond_start(of_it, options) for name, of_it in runs.items()}
    print(
        f"\n{options.teacher}, {options.device}, {options.workers} workers, batches of {options.batch}, {machine()['cpu']}\n"
    )
    print("| | pairs/s beyond the start | CPU s a pair | share of the forwards' rate | of their CPU s |")
    print("|---|---|---|---|---|")
    for name, (wall, cpu) in each.items():
        shares = f"{each['forwards'][0] / wall:.3f} | {each['forwards'][1] / cpu:.3f}"
        print(f"| {name} | {1 / wall:.2f} | {cpu:.4f} | {shares} |")
    if options.out is not None:
        found = {name: [dataclasses.asdict(run) for run in of_it] for name, of_it in runs.items()}
        options.out.write_text(json.dumps({"options": str(options), "machine": machine(), "runs": found}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job_name, job_count, given = json.loads(sys.argv[2])
        given |= {"work": Path(given["work"]), "out": None, "pairs": tuple(given["pairs"])}
        print(json.dumps(dataclasses.asdict(run_job(job_name, job_count, Options(**given)))))
    else:
        main(tyro.cli(Options, description=__doc__))
