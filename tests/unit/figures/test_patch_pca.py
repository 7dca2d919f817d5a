import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group

from clip_cid.figures import patch_pca
from clip_cid.figures.patch_pca import PatchComponents

WIDTH = 12
seeds = st.integers(0, 2**20)


def planted(seed: int, *, images: int = 3, side: int = 8, margin: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Patch features of an object off the border on a plain ground, and where the object is."""
    random = np.random.default_rng(seed)
    mask = np.zeros((images, side, side), dtype=bool)
    for one in mask:
        top, left = random.integers(margin, side // 2, 2)
        one[top : side - margin, left : side - margin] = True
    ground, thing = random.standard_normal((2, WIDTH))
    tokens = np.where(mask[..., None], 8 * thing, 8 * ground) + random.standard_normal((*mask.shape, WIDTH))
    return tokens, mask


def turned(tokens: np.ndarray, seed: int) -> np.ndarray:
    return tokens @ ortho_group.rvs(WIDTH, random_state=seed) + 3.0


@given(seeds)
def test_a_planted_object_is_the_foreground(seed: int) -> None:
    tokens, mask = planted(seed)
    assert (patch_pca.foreground(tokens) == mask).all()
    assert (patch_pca.foreground(-tokens) == mask).all()


def test_an_object_of_more_than_half_the_image_is_still_the_foreground() -> None:
    tokens, mask = planted(0, side=12)
    mask[:] = False
    mask[:, 1:-1, 1:-1] = True
    tokens = np.where(mask[..., None], 5.0, -5.0) + 0.1 * tokens / np.abs(tokens).max()
    assert mask.mean() > 0.5
    assert (patch_pca.foreground(tokens) == mask).all()


@given(seeds, st.sampled_from([(1, 1), (2, 1), (1, 3)]))
def test_another_model_decides_which_side_is_the_foreground(seed: int, times: tuple[int, int]) -> None:
    tokens, mask = planted(seed)
    other = mask.repeat(times[0], axis=1).repeat(times[1], axis=2)
    assert (patch_pca.foreground(tokens, like=other) == mask).all()
    assert (patch_pca.foreground(tokens, like=~other) == ~mask).all()
    assert (patch_pca.components(tokens, like=patch_pca.components(tokens)).foreground == mask).all()


@given(seeds)
def test_features_turned_as_a_whole_give_the_same_picture(seed: int) -> None:
    tokens, _ = planted(seed)
    there, here = patch_pca.components(tokens), patch_pca.components(turned(tokens, seed))
    assert (there.foreground == here.foreground).all()
    assert here.coordinates == pytest.approx(there.coordinates, abs=1e-6)
    aligned = patch_pca.align(here, there)
    assert patch_pca.colors(aligned) == pytest.approx(patch_pca.colors(there), abs=1e-6)


@given(seeds)
def test_principal_components_are_those_of_the_covariance(seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((40, 5)) * [5, 4, 3, 2, 1]
    found = patch_pca.principal(rows, 3)
    centered = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov(rows.T))
    assert np.abs(found) == pytest.approx(np.abs(centered @ directions[:, ::-1][:, :3]))
    assert (found.max(axis=0) == np.abs(found).max(axis=0)).all()


def test_equal_rows_have_no_component() -> None:
    assert patch_pca.principal(np.full((7, 4), 1e4), 3).shape == (7, 0)


@given(seeds)
def test_alignment_undoes_a_turn_or_a_mirror(seed: int) -> None:
    reference = patch_pca.components(planted(seed)[0])
    other = PatchComponents(reference.foreground, reference.coordinates @ ortho_group.rvs(3, random_state=seed))
    mirrored = PatchComponents(reference.foreground, reference.coordinates * [1, -1, 1])
    for own in (other, mirrored):
        assert patch_pca.align(own, reference).coordinates == pytest.approx(reference.coordinates, abs=1e-9)


@given(seeds)
def test_no_other_turn_fits_better(seed: int) -> None:
    reference, own = patch_pca.components(planted(seed)[0]), patch_pca.components(planted(seed + 1)[0])
    both = reference.foreground & own.foreground
    wanted = reference.coordinates[both] - reference.coordinates[both].mean(axis=0)

    def misfit(coordinates: np.ndarray) -> float:
        mine = coordinates[both] - coordinates[both].mean(axis=0)
        return float(((mine - wanted) ** 2).sum())

    least = misfit(patch_pca.align(own, reference).coordinates)
    for turn in ortho_group.rvs(3, size=30, random_state=seed):
        assert least <= misfit(own.coordinates @ turn) + 1e-9


@pytest.mark.slow
@given(seeds)
def test_a_finer_grid_of_the_same_patches_is_aligned_with_the_coarse_one(seed: int) -> None:
    tokens, _ = planted(seed)
    coarse = patch_pca.components(tokens)
    finer = patch_pca.components(turned(tokens, seed).repeat(2, axis=1).repeat(3, axis=2))
    expected = coarse.coordinates.repeat(2, axis=1).repeat(3, axis=2)
    assert patch_pca.align(finer, coarse).coordinates == pytest.approx(expected, abs=1e-6)
    back = patch_pca.align(coarse, finer)
    assert back.coordinates == pytest.approx(coarse.coordinates, abs=1e-6)


def test_models_without_a_common_foreground_are_left_as_they_are() -> None:
    mask = np.zeros((1, 2, 2), dtype=bool)
    mask[0, 0, 0] = True
    one = PatchComponents(mask, np.where(mask[..., None], 1.0, 0.0) * [1, 2, 3])
    other = PatchComponents(~mask, np.where(mask[..., None], 0.0, 1.0) * [4, 5, 6])
    assert patch_pca.align(one, other) is one
    assert patch_pca.overlap(one, other) == 0


def test_colors_go_from_the_first_to_the_last_percentile_and_the_ground_is_black() -> None:
    coordinates = np.stack([np.arange(102.0), -np.arange(102.0), np.full(102, 7.0)], axis=1).reshape(1, 6, 17, 3)
    mask = np.ones((1, 6, 17), dtype=bool)
    mask[0, 5, 16] = False  # leaves 0 to 100, of which 1 and 99 are the percentiles
    found = patch_pca.colors(PatchComponents(mask, coordinates)).reshape(102, 3)
    assert found[[0, 1, 50, 99, 100], 0] == pytest.approx([0, 0, 0.5, 1, 1])
    assert found[[0, 1, 50, 99, 100], 1] == pytest.approx([1, 1, 0.5, 0, 0])
    assert (found[:, 2] == 0).all()
    assert (found[101] == 0).all()


def test_the_overlap_is_what_both_have_of_what_either_has() -> None:
    masks = np.array([[[[True, True, False]]], [[[False, True, True]]]])
    one, other = (PatchComponents(mask, np.zeros((1, 1, 3, 3))) for mask in masks)
    assert patch_pca.overlap(one, other) == pytest.approx(1 / 3)
    assert patch_pca.overlap(one, PatchComponents(np.ones((1, 2, 3), dtype=bool), np.zeros((1, 2, 3, 3)))) is None


@pytest.mark.parametrize("patches", [1, 2, 3])
def test_few_foreground_patches_have_colors_all_the_same(patches: int) -> None:
    tokens = np.random.default_rng(0).standard_normal((1, 6, 6, WIDTH)) * 1e-3
    tokens[0, 2, 1 : 1 + patches] += 10 * np.arange(1, WIDTH + 1)
    found = patch_pca.components(tokens)
    assert found.foreground.sum() == patches
    assert np.isfinite(patch_pca.colors(found)).all()


def test_equal_patches_have_no_foreground() -> None:
    found = patch_pca.components(np.ones((2, 3, 3, 4)))
    assert not found.foreground.any()
    assert (patch_pca.colors(found) == 0).all()


def test_the_csv_holds_every_patch_and_the_first_model_sets_the_colors(tmp_path: Path) -> None:
    tokens, mask = planted(5)
    pictures = [np.full((20, 20, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    models = {"teacher": patch_pca.components(tokens), "student": patch_pca.components(turned(tokens, 5))}
    shown = patch_pca.ClassPatches("<b>thing</b>", images=[4, 7, 9], pictures=pictures, models=models)
    summary = patch_pca.draw([shown], tmp_path)
    share = pytest.approx(mask.mean())
    assert summary == {name: {"foreground_share": share, "overlap": 1.0} for name in ("teacher", "student")}
    with open(tmp_path / "patch_pca.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 2 * mask.size
    names = ("red", "green", "blue")
    teacher, student = (np.array([[float(x[n]) for n in names] for x in lines if x["model"] == m]) for m in models)
    assert student == pytest.approx(teacher, abs=1e-6)
    assert ((teacher == 0).all(axis=1) >= ~mask.ravel()).all()
    assert [line["image"] for line in lines[:: mask[0].size]] == ["4", "7", "9"] * 2
    assert "<b>" not in (tmp_path / "patch_pca.svg").read_text()
