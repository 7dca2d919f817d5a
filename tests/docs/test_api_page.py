"""The examples of docs/api.md do what the page says, in its order."""

import contextlib
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from clip_cid import pipeline
from clip_cid.recipe import parse_recipe
from clip_cid.run_folder import RunFolder

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@contextlib.contextmanager
def users_see_no_checks_of_types() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path):
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert all(">>> " in example for example in examples)
    page = doctest.DocTestParser().get_doctest("".join(examples), {}, PAGE.name, str(PAGE), 0)

    # The page's last part reads a run, whose embeddings are those of its first part.
    random = np.random.default_rng(0)
    rows = random.standard_normal((1_000, 64))
    rows[900:] = rows[:100] + 0.01 * random.standard_normal((100, 64))
    np.save(tmp_path / "rows.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    recipe = parse_recipe({"embed": {"existing": str(tmp_path / "rows.npy")}}, where="test")
    pipeline.run(RunFolder(tmp_path / "runs" / "mine"), recipe, only="embed")

    said: list[str] = []
    with contextlib.chdir(tmp_path), users_see_no_checks_of_types():
        result = doctest.DocTestRunner(optionflags=FLAGS).run(page, out=said.append)
    assert result.attempted > 25
    assert not result.failed, "".join(said)


def test_every_public_name_is_on_the_page():
    import clip_cid

    text = PAGE.read_text()
    assert all(name in text for name in clip_cid.__all__ if name != "__version__")
