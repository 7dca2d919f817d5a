"""The report of a check as text: its tables, then what looks wrong and what was not checked."""

from collections.abc import Iterator

from clip_cid import log, units
from clip_cid.check import Report, estimates
from clip_cid.loss_table import LOSSES
from clip_cid.recipe import settled
from clip_cid.stage_names import BALANCE, CLUSTER, EMBED

_MEASURED, _COUNTED, _ARITHMETIC = "measured", "counted", "arithmetic"
_HOW = ("", "", "how it is known")
Row = tuple[str, str, str]


def say(report: Report) -> None:
    """Print all of it."""
    log.table(_HOW, [*_pairs(report), *_student(report)], title="Pairs and student")

    if report.choices:
        unknown = {EMBED, BALANCE} & {state.stage.name for state in report.undone}
        kept = ", if all pairs are kept" if unknown else ""
        rows = [(choice.setting, f"{choice.value:,}", choice.why) for choice in report.choices]
        log.table(("", "auto is", "because"), rows, title=f"Numbers that are chosen{kept}")

    level = "of a student that sees nothing"
    log.table(("loss", "first step", level), list(_losses(report)), title="Losses")

    for title, rows in (
        ("Time", list(_time(report))),
        ("Memory", list(_memory(report))),
        ("Disk", list(_disk(report))),
        ("The teacher", list(_teacher(report))),
        ("Stages before the training", list(_before(report))),
    ):
        if rows:
            log.table(_HOW, rows, title=title)

    for heading, lines in (("Not checked", report.unchecked), ("Warnings", report.warnings)):
        if lines:
            log.say(f"\n{heading}")
            for line in lines:
                log.say(f"  - {line}")
    log.say(f"\n{verdict(report)}")


def verdict(report: Report) -> str:
    """The last line; a run that is refused gets no report."""
    warnings = units.counted(len(report.warnings), "warning")
    if report.undone:
        names = ", ".join(f"{state.stage.name} ({state.status})" for state in report.undone)
        return f"The run can begin: {warnings}. Still to run before the training: {names}."
    return f"The training can begin: {warnings}."


def _pairs(report: Report) -> Iterator[Row]:
    sights, most = report.sights, "at most " if report.undone else ""
    yield "pairs to train on", f"{most}{report.pairs:,}", _COUNTED
    if (per_cluster := report.recipe.distill.per_cluster) is not None:
        yield "pairs in an epoch", f"{most}{report.epoch_pairs:,}", f"{_COUNTED}; at most {per_cluster:,} of a cluster"
    if report.held_out:
        yield "pairs held out", f"{report.held_out:,}", _COUNTED
    if report.texts:
        a_step = report.recipe.distill.lines_per_step
        yield "texts without images", f"{report.texts:,}; {a_step:,} in a step", _COUNTED
    if report.given_captions:
        yield (
            "captions of removed near-duplicates",
            f"{report.given_captions:,}",
            f"{_COUNTED}; distill.merged_captions",
        )

    looked = f"{sights.pairs:,} pairs looked at"
    if sights.unreadable:
        yield "unreadable", f"{sights.unreadable:,}", looked
    if sights.without_caption:
        yield "without a caption", _share(sights.without_caption, sights.pairs - sights.unreadable), looked

    least, middle, longest = sights.sides
    yield "short side of the images", f"{least:,} to {longest:,} pixels, median {middle:,}", looked
    yield "smaller than the student's images", f"{_share(sights.smaller, sights.pairs - sights.unreadable)}", looked
    yield "bytes of an image", f"{sights.kilobytes:,.1f} kB", looked
    length = report.reading.batch.texts.shape[1]
    yield (
        f"captions longer than {length} tokens",
        _share(sights.truncated, sights.captions),
        f"{sights.captions:,} captions",
    )


def _student(report: Report) -> Iterator[Row]:
    parameters = report.parameters
    yield "parameters of the image tower", f"{parameters['image']:,}", _COUNTED
    yield "parameters of the text tower", f"{parameters['text']:,}", _COUNTED
    if parameters["head"]:
        learns = "it learns" if report.recipe.distill.head_lr > 0 else "frozen"
        yield f"numbers in the cluster head ({learns})", f"{parameters['head']:,}", _COUNTED

    if report.student is None:
        yield "FLOPs of a pair", "unknown", "a part of the student cannot be counted"
        return
    yield "FLOPs of a pair, forward", _flops(report.student.forward), f"{_COUNTED}; both towers, no losses"

    rows = len(report.reading.batch.rows)
    passes = estimates.forward_passes(report.recipe, rows)
    kept = report.recipe.distill.keeps_text_tower
    whole = report.student.in_step(passes=passes, reads_texts=not kept)
    how = f"{_ARITHMETIC}: {2 + passes} x forward" + (" of the image tower" if kept else "")
    yield "FLOPs of a pair in a step", _flops(whole), how + (", with what is computed again" if passes > 1 else "")
    if kept and report.own_towers is not None:
        of_both = report.own_towers.in_step(passes=passes, reads_texts=True)
        yield (
            "saved by distill.text_tower",
            units.percent(1 - whole / of_both, 0),
            f"{_ARITHMETIC}: of a step with its own",
        )


def _losses(report: Report) -> Iterator[Row]:
    of_targets = {loss.name for loss in LOSSES if loss.reads_targets}
    for name, value in report.rehearsal.first.parts.items():
        chance = report.chance.get(name)
        note = " (random targets)" if report.undone and name in of_targets else ""
        yield name, f"{value:.3f}{note}", "-" if chance is None else f"{chance:.3f}"
    if report.rehearsal.centers is not None:
        yield "centers in the step", f"{report.rehearsal.centers:,}", ""


def _time(report: Report) -> Iterator[Row]:
    settings, duration = report.recipe.distill, report.duration
    batch, most = settled(settings.batch_size), "at most " if report.undone and settings.steps is None else ""
    steps = f"{_MEASURED}, median of {report.rehearsal.steps} steps on {report.device}"
    yield "step", _seconds(duration.compute), steps
    yield "pairs a second, without waiting", f"{batch / duration.compute:,.0f}", steps
    workers = report.recipe.machine.workers
    how = f"{_MEASURED}, {report.reading.batches} batches, {workers} workers, nothing else running"
    yield "reading a batch", _seconds(duration.reading), how
    overlap = "the longer of both" if duration.overlaps else "one after the other"
    yield "waiting for data", units.percent(duration.wait_share, 0), f"{_ARITHMETIC}: {overlap}"
    yield "steps", f"{most}{duration.steps:,}", _ARITHMETIC
    yield "pairs seen", f"{most}{duration.steps * batch:,}", f"{_ARITHMETIC}: steps x {batch:,}"
    if report.label_seconds is not None:
        yield "labels, once", units.duration(report.label_seconds), f"{_ARITHMETIC}, from those of a batch"
    if report.soft_seconds is not None:
        yield "soft centers, once", units.duration(report.soft_seconds), f"{_ARITHMETIC}, from those of a batch"
    hours = f"{duration.seconds / 3600:,.2f} h ({units.duration(duration.seconds)})"
    yield "the whole training", most + hours, f"{_ARITHMETIC}, without validation and checkpoints"


def _memory(report: Report) -> Iterator[Row]:
    rehearsed, workers = report.rehearsal, report.recipe.machine.workers
    yield "this process, at most", f"{rehearsed.memory_gib:,.2f} GiB", _MEASURED
    if rehearsed.device_memory_gib is not None:
        yield f"{report.device}, at most", f"{rehearsed.device_memory_gib:,.2f} GiB", f"{_MEASURED}; tensors only"
    if workers:
        how = f"{_MEASURED}; shared pages included"
        yield f"the largest of {workers} workers", f"{report.worker_memory_gib:,.2f} GiB", how
        yield "batches they hold ready", units.size(report.waiting_bytes), f"{_ARITHMETIC}: 2 for each worker"


def _disk(report: Report) -> Iterator[Row]:
    disk, keep = report.disk, report.recipe.machine.keep_checkpoints
    best = " and the best student" if report.recipe.distill.validation.keep == "best" else ""
    if disk.before:
        views = f" and {report.recipe.embed.views:,} views" if report.recipe.embed.views else ""
        how = f"{_ARITHMETIC}: embeddings (one caption{views} a pair), centers, texts"
        yield "stages before", units.size(disk.before), how

    if disk.labels:
        yield "labels, while it trains", units.size(disk.labels), _ARITHMETIC
    if disk.soft_centers:
        yield "soft centers, while it trains", units.size(disk.soft_centers), _ARITHMETIC
    yield "a checkpoint", units.size(disk.checkpoint), f"{_ARITHMETIC}: weights and the optimizer's state"
    yield (
        "checkpoints, while it trains",
        units.size(disk.checkpoints),
        f"{_ARITHMETIC}: {keep} kept, one being written{best}",
    )

    yield "the student it leaves", units.size(disk.student), _ARITHMETIC
    yield "metrics", units.size(disk.metrics), f"{_ARITHMETIC}, at most"
    yield "needed at most", units.size(disk.needed), _ARITHMETIC
    yield "free", units.size(disk.free), _MEASURED


def _teacher(report: Report) -> Iterator[Row]:
    teacher, views = report.teacher, report.recipe.embed.views
    if teacher is None:
        return
    yield "teacher", teacher.name, "the embeddings" if report.embed_seconds is not None else "the recipe"

    if teacher.width is not None or report.teacher_dim is not None:
        width = teacher.width or report.teacher_dim or 0
        known = "" if teacher.width else " (the student's own; the teacher's is not known)"
        total = estimates.embedding_bytes(report.pairs, width, views=views)
        yield (
            "embeddings of the pairs to train on",
            units.size(total),
            f"{_ARITHMETIC}: {2 * (2 + views)} x {width:,} bytes a pair{known}",
        )
        if views:
            of_views = total - estimates.embedding_bytes(report.pairs, width, views=0)
            yield f"of these, {views:,} views of each image", units.size(of_views), _ARITHMETIC
    if report.embed_seconds is not None:
        yield "embedding all pairs, once", units.duration(report.embed_seconds), f"{_MEASURED}, by the embed stage"

    if teacher.costs is None:
        yield "FLOPs of a pair in the teacher", "unknown", "its configuration is not here, or cannot be counted"
        return
    parameters = f"{teacher.costs.parameters:,}"
    yield "parameters of the teacher", parameters, f"{_COUNTED}; with stored embeddings none is loaded"
    yield "FLOPs of a pair in the teacher", _flops(teacher.costs.forward), f"{_COUNTED}; both towers"
    embedding = report.pairs * (teacher.costs.forward + views * teacher.costs.image_flops)
    more = f", and {views:,} more passes of its image tower" if views else ""
    yield "embedding these pairs, once", _flops(embedding), f"{_ARITHMETIC}: pairs x teacher{more}"
    if report.embed_seconds is None and report.student is not None:
        speed = report.student.training * settled(report.recipe.distill.batch_size) / report.duration.compute
        yield "time of that", units.duration(embedding / speed), f"{_ARITHMETIC}, at the speed of the student's steps"


def _before(report: Report) -> Iterator[Row]:
    names = {state.stage.name for state in report.undone}
    width, recipe = report.teacher_dim or 0, report.recipe
    for state in report.undone:
        yield state.stage.name, state.status, state.reason
    if BALANCE in names:
        least, most = estimates.balance_room(report.pairs, width, on_cuda=report.device.type == "cuda")
        yield (
            "memory of balance",
            f"up to {units.size(estimates.balance_memory(report.pairs))}",
            f"{_ARITHMETIC}, docs/scale.md",
        )
        yield "disk while balance works", f"{units.size(least)} to {units.size(most)}", f"{_ARITHMETIC}, docs/scale.md"
    if CLUSTER in names:
        centers = settled(recipe.cluster.num_centers)
        if recipe.cluster.texts:  # one after the other
            centers = max(centers, recipe.cluster.text_centers)
        needed = estimates.cluster_memory(report.pairs, centers, width)
        yield "memory of cluster", units.size(needed), f"{_ARITHMETIC}, docs/scale.md, before balance"


def _flops(count: float) -> str:
    for unit, name in ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e6:,.2f} MFLOPs"


def _seconds(seconds: float) -> str:
    return units.duration(seconds) if seconds >= 1 else f"{1000 * seconds:,.1f} ms"


def _share(count: int, total: int) -> str:
    return units.percent(count / total) if total else "none"
