"""What the tests of several processes train on: a tiny teacher, and the stages before a student."""

TEACHER = {
    "pairs": {"source": ["data/pairs/*.tar"]},
    "embed": {"teacher": "none"},
    "distill": {"student": "cid-tiny", "weights": "clip-only", "batch_size": 32, "steps": 4, "warmup_steps": 1},
    "machine": {"workers": 0, "threads": 1, "tensorboard": "off"},
}
BEFORE = {
    "pairs": {"source": ["data/pairs/*.tar"]},
    "embed": {"teacher": "run:teacher"},
    "balance": {"threshold": 0.002},
    "cluster": {"num_centers": 8, "iterations": 3},
    "machine": {"workers": 0, "threads": 1, "tensorboard": "off", "checkpoint_minutes": 1e-6},
}
