"""The long description of the package: README.md with links that also work on the package index.

Everything else is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def long_description(readme: str, *, repository: str, version: str) -> str:
    """The text with relative links made absolute, to the files of this version; pictures to their bytes."""
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(link: re.Match[str]) -> str:
        base = f"{raw}/v{version}" if link[1] else f"{repository}/blob/v{version}"
        return f"{link[1]}[{link[2]}]({base}/{link[3]})"

    return _LINK.sub(absolute, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=long_description(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            repository=project["urls"]["Repository"],
            version=project["version"],
        ),
        long_description_content_type="text/markdown",
    )
