"""Where what comes from elsewhere is kept."""

from pathlib import Path


def cache_folder(cache_dir: Path | None) -> Path:
    """`machine.cache_dir`, or ~/.cache/clip_cid; absolute."""
    return (cache_dir if cache_dir is not None else Path.home() / ".cache" / "clip_cid").absolute()
