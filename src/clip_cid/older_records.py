"""What records of older versions know of files made elsewhere: names, bytes and times, in digests of their own.

Such a record stays current as it was under the version that wrote it, so that an upgrade makes no stage again.
"""

from pathlib import Path

from clip_cid.errors import DataError
from clip_cid.file_digests import digest
from clip_cid.recipe import PairsConfig, Recipe
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, EMBED, EVALUATE


def inputs_then(stage: str, recipe: Recipe) -> dict[str, str]:
    """The digests that an older version would have recorded for the files as they are now."""
    settings = recipe.distill
    if stage == EMBED:
        return _pairs(recipe.pairs) | _paths(recipe.embed.existing, _weights(recipe.embed.teacher))
    if stage == BALANCE:
        return _paths(recipe.balance.existing)
    if stage == CLUSTER:
        return _paths(recipe.cluster.existing)
    if stage == DISTILL:
        pretrained = settings.pretrained or ""
        models = _paths(Path(settings.student), _weights(pretrained) or Path(pretrained))
        return _pairs(recipe.pairs) | _sets(settings.validation.sets) | models
    if stage == EVALUATE:
        retrieval: dict[str, str] = {}
        for name, source in recipe.evaluate.retrieval.items():
            if then := _pairs(recipe.pairs.model_copy(update={"source": source})):
                retrieval[name] = then["pairs"]
        models = _paths(*(_weights(reference) for reference in recipe.evaluate.compare.values()))
        return _sets(recipe.evaluate.sets) | retrieval | models
    return {}


def _pairs(pairs: PairsConfig) -> dict[str, str]:
    from clip_cid.data.pairs.pairs import fingerprint  # pyarrow, which `clip-cid --help` does without

    try:
        return {"pairs": digest(fingerprint(pairs))} if pairs.source else {}
    except DataError:  # not here
        return {}


def _sets(sets: dict[str, str]) -> dict[str, str]:
    here = {name: Path(where) for name, where in sets.items() if Path(where).is_dir()}
    return {name: _listing([*folder.glob("*"), *folder.glob("*/*")]) for name, folder in here.items()}


def _paths(*paths: Path | None) -> dict[str, str]:
    return {str(path): _listing(_files(path)) for path in paths if path is not None and path.name and path.exists()}


def _weights(reference: str) -> Path | None:
    kind, _, path = reference.partition(":")
    folders = {"run": Path(path) / DISTILL / "student", "local-dir": Path(path)}
    return folders[kind] / "open_clip_model.safetensors" if kind in folders else None


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _listing(paths: list[Path]) -> str:
    return digest([(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in sorted(paths)])
