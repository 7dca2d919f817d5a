"""Features before and after the projection are the model's own, and are computed once."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import tiny_clip
from torch import nn

from clip_cid.data.pairs.pair import BadSample
from clip_cid.devices import Returning, one_ahead
from clip_cid.errors import ConfigError, DataError
from clip_cid.evaluation import features
from clip_cid.evaluation.features import Encoder, UnmeasurableError, prune
from clip_cid.evaluation.towers import both_features
from clip_cid.models.clip import Clip
from clip_cid.models.teacher import weights_sha256


@dataclass(frozen=True)
class Noise:
    """Images of seeded noise; some cannot be decoded."""

    count: int
    broken: frozenset[int] = frozenset()
    title: str = "noise/test"
    fingerprint: str = "1"

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        return f"noise {row}"

    def load(self, row: int) -> Image.Image:
        if row in self.broken:
            raise BadSample("no image")
        pixels = np.random.default_rng(row).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


class Unreadable(Noise):
    """Fails when anyone reads it."""

    def load(self, row: int) -> Image.Image:
        raise AssertionError("read again")


def encoder(clip: Clip, folder: Path, *, batch_size: int = 8, workers: int = 0, **options: Any) -> Encoder:
    device = torch.device("cpu")
    return Encoder("tiny", clip, folder / "cache", device=device, batch_size=batch_size, workers=workers, **options)


def encode(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    model: Any = clip.model
    return model.encode_image(pixels)


def timm_tower(pool: str, proj: str) -> dict[str, object]:
    return {"timm_model_name": "resnet10t", "timm_pool": pool, "timm_proj": proj, "image_size": 32}


def vit_projection(visual: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda before: before @ visual.proj


TOWERS = {
    "vit": ({}, vit_projection, 32),
    "resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, lambda visual: visual.attnpool.c_proj, 256),
    "timm, linear head": (timm_tower("avg", "linear"), lambda visual: visual.head.proj, 512),
    "timm, mlp head": (timm_tower("avg", "mlp"), lambda visual: visual.head.mlp, 512),
    "timm, its own classifier": (timm_tower("avg", ""), lambda visual: visual.trunk.get_classifier(), 512),
    "timm, none": (timm_tower("avg", "none"), lambda visual: nn.Identity(), 512),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_what_comes_before_becomes_by_the_projection_what_comes_after(tower: str, tmp_path: Path) -> None:
    vision_cfg, projection, width = TOWERS[tower]
    embed_dim = width if tower == "timm, none" else 12  # without a projection both towers need one width
    clip = tiny_clip(tmp_path, embed_dim=embed_dim, **vision_cfg)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encode(clip, pixels)
        with both_features(clip) as taps:
            before, after = taps(pixels)
        assert before.shape == (3, width)
        torch.testing.assert_close(after, expected)
        torch.testing.assert_close(projection(clip.model.visual)(before), expected)
        torch.testing.assert_close(encode(clip, pixels), expected, rtol=0, atol=0)  # the model is as it was


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_the_model_is_as_it_was_after_an_error_too(tower: str, tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path, **TOWERS[tower][0])
    digest = weights_sha256(clip.model)
    with pytest.raises(RuntimeError), both_features(clip) as taps:
        taps(torch.zeros(1, 4, 32, 32))
    assert weights_sha256(clip.model) == digest


def test_a_tower_of_another_kind_is_refused_with_the_way_out(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    clip.model.visual = nn.Flatten()
    with pytest.raises(ConfigError, match=r"image tower \(Flatten\)") as error, both_features(clip):
        pass
    assert "after_projection" in error.value.fix


def test_features_are_those_of_the_model_image_by_image(tmp_path: Path) -> None:
    clip, source = tiny_clip(tmp_path), Noise(11)
    found = encoder(clip, tmp_path, batch_size=4).images(source, before=True)
    assert found.before is not None
    assert found.before.shape == (11, 32)
    assert found.rows.tolist() == list(range(11))
    with torch.inference_mode():
        expected = torch.cat([encode(clip, clip.preprocess(source.load(row))[None]) for row in range(11)])
    np.testing.assert_allclose(found.after, expected.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later
def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    clip, source = tiny_clip(tmp_path), Noise(120, broken=frozenset({7}))
    alone = encoder(clip, tmp_path / "a").images(source, before=False)
    helped = encoder(clip, tmp_path / "b", workers=2).images(source, before=False)
    np.testing.assert_array_equal(alone.after, helped.after)
    assert alone.bad == helped.bad == ("noise 7: no image",)


def test_a_second_asking_reads_no_image(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    first = encoder(clip, tmp_path).images(Noise(5), before=True)
    again = encoder(clip, tmp_path).images(Unreadable(5), before=True)
    np.testing.assert_array_equal(first.after, again.after)
    np.testing.assert_array_equal(np.asarray(first.before), np.asarray(again.before))


@pytest.mark.parametrize("what", ["weights", "files", "split", "preprocessing", "before"])
def test_features_of_something_else_are_not_reused(what: str, tmp_path: Path) -> None:
    clip, before = tiny_clip(tmp_path), False
    encoder(clip, tmp_path).images(Noise(5), before=before)
    source = Unreadable(5)
    if what == "weights":
        with torch.no_grad():
            next(clip.model.parameters())[0] += 1e-3
    elif what == "files":
        source = Unreadable(5, fingerprint="2")
    elif what == "split":
        source = Unreadable(5, title="noise/train")
    elif what == "preprocessing":
        clip = dataclasses.replace(clip, preprocess_cfg={**clip.preprocess_cfg, "interpolation": "bilinear"})
    else:
        before = True
    with pytest.raises(AssertionError, match="read again"):
        encoder(clip, tmp_path).images(source, before=before)


def test_an_image_that_cannot_be_decoded_is_named_and_shifts_no_row(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    whole = encoder(clip, tmp_path).images(Noise(100), before=True)
    damaged = Noise(100, broken=frozenset({42}), fingerprint="2")
    for _ in range(2):  # computed, then from the cache
        found = encoder(clip, tmp_path).images(damaged, before=True)
        assert found.bad == ("noise 42: no image",)
        assert found.rows.tolist() == [row for row in range(100) if row != 42]
        np.testing.assert_allclose(found.after, whole.after[found.rows], atol=1e-5)
        np.testing.assert_allclose(np.asarray(found.before), np.asarray(whole.before)[found.rows], atol=1e-5)


def test_more_than_one_bad_image_in_a_hundred_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    with pytest.raises(DataError, match=r"2 images so far .* more than 1 % of 100: noise 3 \(no image\), noise 50"):
        encoder(clip, tmp_path).images(Noise(100, broken=frozenset({3, 50})), before=False)
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize(("count", "broken", "left"), [(20, 1, 19), (2, 1, 1), (100, 1, 99), (300, 3, 297)])
def test_one_bad_image_or_one_in_a_hundred_is_left_out(count: int, broken: int, left: int, tmp_path: Path) -> None:
    found = encoder(tiny_clip(tmp_path), tmp_path).images(Noise(count, frozenset(range(broken))), before=False)
    assert (len(found.rows), len(found.after), len(found.bad)) == (left, left, broken)


@pytest.mark.parametrize(("count", "broken"), [(20, 2), (1, 1), (2, 2), (299, 3)])
def test_more_bad_images_or_nothing_else_make_a_set_unmeasurable(count: int, broken: int, tmp_path: Path) -> None:
    with pytest.raises(UnmeasurableError, match="cannot be decoded"):
        encoder(tiny_clip(tmp_path), tmp_path).images(Noise(count, frozenset(range(broken))), before=False)


def test_a_split_that_is_refused_once_is_not_decoded_again(tmp_path: Path) -> None:
    class Counted(Noise):
        loads = 0

        def load(self, row: int) -> Image.Image:
            Counted.loads += 1
            return super().load(row)

    there, source = encoder(tiny_clip(tmp_path), tmp_path), Counted(3, broken=frozenset({0, 1}))
    for before in (True, False):
        with pytest.raises(UnmeasurableError):
            there.images(source, before=before)
    assert Counted.loads == 3


def test_a_pass_that_is_cut_short_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    class Killed(Noise):
        def load(self, row: int) -> Image.Image:
            if row == 15:
                raise KeyboardInterrupt
            return super().load(row)

    clip = tiny_clip(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        encoder(clip, tmp_path).images(Killed(20), before=True)
    found = encoder(clip, tmp_path).images(Noise(20), before=True)
    assert np.isfinite(found.after).all()


def test_a_model_that_gives_nan_is_named_with_the_image(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    model: Any = clip.model
    with torch.no_grad():
        model.visual.proj.fill_(torch.nan)
        model.text_projection.fill_(torch.nan)
    with pytest.raises(DataError, match=r"tiny: 5 of 5 images have features that are NaN, .* the first noise 0"):
        encoder(clip, tmp_path).images(Noise(5), before=True)
    with pytest.raises(DataError, match="tiny: 2 of 2 texts embed as NaN, the first 'a cat'"):
        encoder(clip, tmp_path).texts("noise", ["a cat", "a dog"])


def test_a_model_that_gives_zero_is_named(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    model: Any = clip.model
    with torch.no_grad():
        model.visual.proj.zero_()
    with pytest.raises(DataError, match="NaN, infinite or all zero"):
        encoder(clip, tmp_path).images(Noise(5), before=False)


def test_texts_are_unit_vectors_in_order_whatever_the_batch(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    texts = [f"{number} cats" for number in range(7)]
    small = encoder(clip, tmp_path / "a", batch_size=2).texts("t", texts)
    large = encoder(clip, tmp_path / "b", batch_size=100).texts("t", texts)
    np.testing.assert_allclose(small, large, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(small, axis=1), 1, rtol=1e-5)
    other = encoder(clip, tmp_path / "a").texts("t", texts[::-1])
    np.testing.assert_allclose(other[::-1], small, atol=1e-6)


def test_texts_by_another_tokenizer_are_other_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny_clip(tmp_path)
    first = encoder(clip, tmp_path, tokenizer={"tokenizer.json": "1"})
    other = encoder(clip, tmp_path, tokenizer={"tokenizer.json": "2"})
    first.texts("t", ["a cat"])
    images = first.images(Noise(3), before=False)
    np.testing.assert_array_equal(other.images(Unreadable(3), before=False).after, images.after)
    assert first.identity != other.identity
    monkeypatch.setattr(Encoder, "_encode", lambda *_: pytest.fail("computed again"))
    encoder(clip, tmp_path, tokenizer={"tokenizer.json": "1"}).texts("t", ["a cat"])
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        other.texts("t", ["a cat"])


@pytest.mark.parametrize("damage", ["zeros", "header", "cut", "gone", "entry", "entry is a list"])
def test_cached_features_that_are_not_as_they_were_written_are_made_again(damage: str, tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    first = encoder(clip, tmp_path).images(Noise(5), before=True)
    after, texts = np.array(first.after), encoder(clip, tmp_path).texts("t", ["a cat"])
    for path in (tmp_path / "cache").rglob("*.json" if damage.startswith("entry") else "*.npy"):
        content = path.read_bytes()
        if damage == "zeros":
            path.write_bytes(content[:128] + bytes(len(content) - 128))
        elif damage == "header":
            path.write_bytes(b"x" + content[1:])
        elif damage == "cut":
            path.write_bytes(content[:-4])
        elif damage == "gone":
            path.unlink()
        else:
            path.write_text("[]" if "list" in damage else content.decode()[:-9])
    np.testing.assert_array_equal(encoder(clip, tmp_path).images(Noise(5), before=True).after, after)
    np.testing.assert_array_equal(encoder(clip, tmp_path).texts("t", ["a cat"]), texts)


def test_pruning_deletes_what_was_not_asked_for(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    first = encoder(clip, tmp_path)
    first.images(Noise(3), before=False)
    second = encoder(clip, tmp_path)
    second.texts("t", ["a cat"])
    used = second.forget_used()
    assert second.forget_used() == []
    assert prune(tmp_path / "cache", frozenset(used)) == 1
    assert prune(tmp_path / "cache", frozenset(used)) == 0
    assert [path.name for path in (tmp_path / "cache").rglob("*.npy")] == ["texts.npy"]
    assert prune(tmp_path / "nothing", frozenset()) == 0


def test_on_a_device_a_batch_is_waited_for_when_the_next_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, source = tiny_clip(tmp_path), Noise(20, frozenset({3}))
    plain = encoder(clip, tmp_path / "plain").images(source, before=True)

    happened: list[str] = []

    class Told(Returning):
        def __init__(self, values: torch.Tensor) -> None:
            happened.append("begin")
            super().__init__(values)

        def here(self) -> torch.Tensor:
            happened.append("wait")
            return super().here()

    monkeypatch.setattr(features, "Returning", Told)
    monkeypatch.setattr(
        features, "one_ahead", lambda batches, begin, _: one_ahead(batches, begin, torch.device("meta"))
    )
    ahead = encoder(clip, tmp_path / "ahead").images(source, before=True)
    assert happened == ["begin"] * 2 + (["begin"] * 2 + ["wait"] * 2) * 2 + ["wait"] * 2
    assert np.array_equal(plain.after, ahead.after)
    assert np.array_equal(plain.rows, ahead.rows)
