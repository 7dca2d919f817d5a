"""Variables of MATLAB files, read in a process of their own: SciPy's reader crashes on some damaged files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from clip_cid.data.sets.readers.layout_parts import damaged

_READ = """
import json, sys
import numpy as np
from scipy.io import loadmat

value = np.atleast_1d(loadmat(sys.argv[1], squeeze_me=True, variable_names=[sys.argv[2]])[sys.argv[2]])
rows = [dict(zip(value.dtype.names, row)) if value.dtype.names else row for row in value.tolist()]
print(json.dumps(rows, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other)))
"""


def rows_of(path: Path, variable: str) -> list[Any]:
    """The entries of one variable in order; of a structure a dictionary each.

    Raises:
        DataError: The file is damaged, or has no such variable.
    """
    command = [sys.executable, "-c", _READ, str(path), variable]
    reader = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if reader.returncode == 0:
        return json.loads(reader.stdout)
    last = reader.stderr.strip().rpartition("\n")[2]
    reason = last if reader.returncode > 0 else f"the reader died of signal {-reader.returncode}"
    raise damaged(path, f"has no readable variable `{variable}` ({reason})")


def whole_numbers_of(path: Path, variable: str) -> list[int]:
    """The entries of a variable that holds whole numbers.

    Raises:
        DataError: As `rows_of`, or an entry is none.
    """
    rows = rows_of(path, variable)
    if wrong := [row for row in rows if not isinstance(row, int | float) or row != row or row % 1]:
        raise damaged(path, f"variable `{variable}` holds {wrong[0]!r}, not a whole number")
    return [int(row) for row in rows]
