"""docs/method.md and the code name the same equations."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

from clip_cid.loss_table import LOSSES, Loss

ROWS = re.findall(
    r"^- \*\*`(?P<name>[^`]+)`[^(]*\((?P<status>.*?)\):\s+"
    r"`(?P<module>[\w.]+):(?P<function>[\w.]+)`\n"
    r"(?P<symbols>(?:    ? ?.*\n|  - .*\n)*)",
    (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)


@pytest.mark.parametrize(("name", "status", "module", "function", "symbols"), ROWS, ids=[row[0] for row in ROWS])
def test_each_equation_is_where_the_map_says(name, status, module, function, symbols):
    code = functools.reduce(getattr, function.split("."), importlib.import_module(module))
    assert f"`{name}`" in (inspect.getdoc(code) or "")
    assert re.match(r"given|inferred|our choice", status)
    source = inspect.getsource(importlib.import_module(module))
    assert all(argument.split("[")[0] in source for argument in re.findall(r"`([^`]+)`", symbols))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_each_loss_of_the_table_has_its_row_in_the_map(loss: Loss):
    code = {name: f"{module}:{function}" for name, _, module, function, _ in ROWS}
    assert code[loss.equation] == f"clip_cid.method.distill.{loss.function}"


def test_the_map_names_every_equation_of_the_paper():
    named = {row[0] for row in ROWS}
    assert named >= {"eq_kmeans", "L_clip", "L_cls", "L_kl", "L_cluster", "L_instance", "L_total", "I(a, b)"}
    assert len(ROWS) == len(named) == 49
