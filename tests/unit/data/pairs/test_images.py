import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample

MANY = 10_000_000


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("RGB", "L", "P", "RGBA", "1"),
    "TIFF": ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_pixels_are_those_of_open_clips_convert(kind: str, mode: str) -> None:
    data = encoded(noise().convert(mode), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    decoded = decode_image(data, max_pixels=MANY)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_a_transparent_palette_makes_no_warning() -> None:
    image = noise().convert("P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    with pytest.warns(UserWarning, match="Transparency"):
        Image.open(io.BytesIO(data)).convert("RGB")
    decode_image(data, max_pixels=MANY)  # warnings are errors in these tests


def test_more_pixels_than_allowed_are_refused_and_as_many_are_not() -> None:
    data = encoded(noise(size=(40, 30)), "PNG")
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(BadSample, match=r"more pixels than pairs\.max_pixels 1,199"):
        decode_image(data, max_pixels=1199)


@pytest.mark.parametrize("side", [10_000, 100_000])  # Pillow itself warns of the first and refuses the second
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    with pytest.raises(BadSample, match="more pixels"):
        decode_image(png_that_claims(side, side), max_pixels=89_478_485)


def test_a_limit_above_pillows_own_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(size=(40, 30)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    assert decode_image(data, max_pixels=1200).size == (40, 30)


@pytest.mark.parametrize("kind", list(MODES))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_an_image_cut_short_is_a_bad_sample(kind: str, share: float) -> None:
    data = encoded(noise(), kind)
    with pytest.raises(BadSample, match="image"):
        decode_image(data[: int(len(data) * share)], max_pixels=MANY)


def test_a_library_that_lets_pillow_fill_in_missing_pixels_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(), "JPEG")
    with pytest.raises(BadSample, match="image cannot be decoded"):
        decode_image(data[: len(data) // 2], max_pixels=MANY)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_pillows_limit_is_put_back_after_good_and_bad_images() -> None:
    before = Image.MAX_IMAGE_PIXELS
    decode_image(encoded(noise(), "PNG"), max_pixels=MANY)
    with pytest.raises(BadSample):
        decode_image(b"not an image", max_pixels=5)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_raster_image_is_a_bad_sample(data: bytes) -> None:
    with pytest.raises(BadSample, match="image is"):
        decode_image(data, max_pixels=MANY)


@settings(deadline=None)
@given(kind=st.sampled_from(list(MODES)), data=st.data())
def test_damaged_bytes_give_pixels_or_a_bad_sample_and_nothing_else(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(noise(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadSample):
        assert decode_image(bytes(whole), max_pixels=MANY).mode == "RGB"
