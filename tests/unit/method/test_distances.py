import pytest

from clip_cid.method.distances import threshold_on


def test_thresholds_on_all_three_scales():
    assert threshold_on("cosine", 0.07, "squared_euclidean") == pytest.approx(0.14)
    assert threshold_on("cosine", 0.07, "euclidean") == pytest.approx(0.14**0.5)
    assert threshold_on("euclidean", 0.07, "cosine") == pytest.approx(0.00245)
    assert threshold_on("squared_euclidean", 0.07, "cosine") == pytest.approx(0.035)
    assert threshold_on("cosine", 0.07, "cosine") == 0.07
