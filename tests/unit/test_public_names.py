import importlib.metadata
import operator
import subprocess
import sys

import pytest

import clip_cid
from clip_cid.method.balance import semantic_balance
from clip_cid.method.cluster import clustering


def test_the_public_names_are_those_of_the_method():
    assert clip_cid.balance is semantic_balance.balance
    assert clip_cid.Balance is semantic_balance.Balance
    assert clip_cid.spherical_kmeans is clustering.spherical_kmeans
    assert clip_cid.Clusters is clustering.Clusters
    assert clip_cid.EmbeddingStore.__name__ == "EmbeddingStore"
    assert clip_cid.__version__ == importlib.metadata.version("clip-cid")
    assert set(clip_cid.__all__) <= set(dir(clip_cid))

    with pytest.raises(AttributeError, match=r"module .clip_cid. has no attribute .blance."):
        operator.attrgetter("blance")(clip_cid)


def test_heavy_packages_are_imported_when_needed_only():
    code = """
import sys
import clip_cid
assert not {"torch", "faiss", "scipy", "numpy"} & set(sys.modules), "import clip_cid"
clip_cid.spherical_kmeans
assert "torch" not in sys.modules, "k-means"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
