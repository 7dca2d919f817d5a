"""Other made-up data on request: with `CLIP_CID_SEED_SHIFT=1000`, every seed that a test file names is 1,000 more.

A law must hold for every seed. Seeds that the package names stay as they are, and so do those behind a golden file.
"""

import os
import random
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"


def shift_seeds(shift: int) -> None:
    """Replace the makers of random numbers by such that add `shift` to a seed given in a file of this folder."""
    import numpy as np
    import torch

    make_rng, seed_torch = np.random.default_rng, torch.manual_seed

    def default_rng(seed: Any = None) -> np.random.Generator:
        return make_rng(shifted(seed))

    def manual_seed(seed: int) -> torch.Generator:
        return seed_torch(shifted(seed))

    def shifted(seed: Any) -> Any:
        caller = Path(sys._getframe(2).f_code.co_filename)
        if not caller.is_relative_to(TESTS) or caller.is_relative_to(GOLDEN):
            return seed
        if isinstance(seed, tuple | list):
            return [*seed, shift]
        return seed + shift if isinstance(seed, int | np.integer) else seed

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(shifted(seed))

    class Random(random.Random):
        def __init__(self, seed: Any = None) -> None:
            super().__init__(shifted(seed))

    np.random.default_rng, torch.manual_seed = default_rng, manual_seed
    torch.Generator, random.Random = Generator, Random


if shift := int(os.environ.get("CLIP_CID_SEED_SHIFT", "0")):
    shift_seeds(shift)
