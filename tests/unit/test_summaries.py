"""Summaries: the same JSON after reading and writing, and manifests of other versions."""

import json
from typing import Any

import pytest

from clip_cid.errors import RunError
from clip_cid.summaries import (
    BalanceSummary,
    ClusterSummary,
    DistillSummary,
    EmbedSummary,
    Summary,
    as_json,
    read_summary,
)

EMBED = {"images": 5, "ok": 4, "dim": 2, "teacher": "t", "bytes": 8, "skipped": {"too narrow": 1}, "images_per_s": None}
COUNTS = {
    "images": 10,
    "ok": 9,
    "kept": 6,
    "removed": 3,
    "removed_share": 1 / 3,
    "sets_with_duplicates": 2,
    "largest_set": 3,
}
GIANT = {
    "set": 1,
    "size": 3,
    "share_of_rows": 0.3,
    "beyond_threshold_share": 0.5,
    "farthest": 0.2,
    "widest": 0.4,
}
CHAINS = {
    "beyond_threshold_share": 0.5,
    "distance": {"0.5": 0.1, "max": 0.2},
    "largest": 3,
    "top_sizes": [3, 2],
    "giants": [GIANT],
}
KIND = {"images": 0, "share": None, "low": 0.0, "high": 1.0}
BALANCE = COUNTS | {
    "threshold": {"cosine": 0.05},
    "chains": CHAINS,
    "kinds": {"drawn": 2, "unknown": 2, "perceptual": KIND, "semantic": KIND},
    "truth": {"field": "dup", "precision": 1.0, "recall": 0.5, "redundant_share": 0.25},
}
CLUSTER = {
    "images": 6,
    "centers": 2,
    "empty": 0,
    "singletons": 0,
    "smallest": 3,
    "median": 3.0,
    "largest": 3,
    "gini": 0.0,
    "size_quantiles": {"0": 3},
    "within_cosine": None,
    "all_pairs_cosine": 0.1,
    "margin_quantiles": {},
    "margin_sample": 0,
}
DISTILL = {
    "steps": 3,
    "pairs": 6,
    "pairs_seen": 6,
    "epochs": 1.0,
    "unreadable_pairs": 0,
    "skipped_steps": 0,
    "processes": 1,
    "seconds": 2.0,
    "pairs_per_s": 3.0,
    "data_wait_share": 0.0,
    "loss": 3.0,
    "loss/clip": 2.0,
    "loss/cluster_kl": None,
    "best_step": 2,
    "best_retrieval": 0.5,
    "collapse_alarm": False,
    "precision": "float32",
    "peak_memory_gib": 1.0,
    "head_scale": 16.0,
    "teacher_perplexity": 3.0,
    "parameters": {"image": 4, "text": 5},
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (EmbedSummary, EMBED),
        (BalanceSummary, BALANCE),
        (BalanceSummary, COUNTS | {"from": "kept.npy"}),
        (ClusterSummary, CLUSTER | {"from": "clusters"}),
        (
            ClusterSummary,
            CLUSTER
            | {
                "objective": 0.3,
                "history": [{"objective": 0.3, "imbalance": 1.0, "empty": 0}],
                "truth": {"field": "c", "share": 1.0, "shuffled": 0.5, "rows": 6, "classes": 2},
            },
        ),
        (DistillSummary, DISTILL),
    ],
)
def test_a_summary_read_and_written_again_is_the_same_json_in_the_same_order(
    kind: type[Summary], values: dict[str, Any]
):
    assert json.dumps(as_json(read_summary(kind, values))) == json.dumps(values)


def test_parts_are_read_as_their_types():
    balance = read_summary(BalanceSummary, BALANCE)
    assert balance.chains is not None
    assert balance.chains.giants[0].farthest == 0.2
    assert balance.truth is not None
    assert balance.truth.recall == 0.5
    assert read_summary(DistillSummary, DISTILL).losses == {"loss": 3.0, "loss/clip": 2.0, "loss/cluster_kl": None}


def test_what_another_version_wrote_beside_is_passed_over():
    assert read_summary(EmbedSummary, EMBED | {"later": 1}) == read_summary(EmbedSummary, EMBED)


def test_the_embeddings_say_why_rows_were_left_out():
    one = {**EMBED, "images": 9, "ok": 6, "skipped": {"no caption": 2, "duplicate key": 1, "nothing": 0}}
    said = str(read_summary(EmbedSummary, one))
    assert said.endswith("; left out, as skipped.jsonl lists: 2 for 'no caption', 1 for 'duplicate key'")
    assert "left out" not in str(read_summary(EmbedSummary, EMBED | {"skipped": {}}))


def test_a_summary_without_a_number_it_must_have_names_it_and_the_stage_to_run_again():
    with pytest.raises(RunError, match=r"embed stage.*KeyError: 'dim'") as error:
        read_summary(EmbedSummary, {name: value for name, value in EMBED.items() if name != "dim"})
    assert "clip-cid embed RUN --force" in str(error.value)
