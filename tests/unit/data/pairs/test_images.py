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

from clip_cid.data.pairs.images import decode_image, image_size
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


def png_of(header: bytes, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_that_claims(width: int, height: int) -> bytes:
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), bytes(1000))


MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("RGB", "L", "P", "RGBA", "1"),
    "TIFF": ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1"),
    "AVIF": ("RGB", "RGBA", "L"),
    "JPEG2000": ("RGB", "L", "RGBA", "LA"),
    "QOI": ("RGB", "RGBA"),
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


GRAY = np.arange(0, 65536, 55, dtype=np.uint16)[:1190].reshape(34, 35)


def big_endian_tiff(values: np.ndarray, *, bits: int = 16, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF of one strip, written by hand: Pillow itself writes few of the kinds that it reads."""
    height, width = values.shape
    pixels = values.astype(values.dtype.newbyteorder(">")).tobytes()
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(pixels),
        339: sample_format,
    }
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + struct.pack(">H", len(tags)) + entries + bytes(4)


def packed_twelve_bits(values: np.ndarray) -> bytes:
    """A little-endian TIFF of 12 bits a value."""
    height, width = values.shape
    bits = "".join(f"{value:012b}" for value in values.ravel())
    pixels = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


SIXTEEN_BITS = {
    "PNG": lambda: encoded(Image.fromarray(GRAY), "PNG"),
    "TIFF": lambda: encoded(Image.fromarray(GRAY), "TIFF"),
    "packed TIFF": lambda: encoded(Image.fromarray(GRAY), "TIFF", compression="tiff_lzw"),
    "big-endian TIFF": lambda: big_endian_tiff(GRAY),
    "JPEG 2000": lambda: encoded(Image.fromarray(GRAY), "JPEG2000"),
    "PGM": lambda: b"P5\n35 34\n65535\n" + GRAY.astype(">u2").tobytes(),
    "plain PGM": lambda: b"P2\n35 34\n65535\n" + " ".join(map(str, GRAY.ravel())).encode(),
}


@pytest.mark.parametrize("kind", list(SIXTEEN_BITS))
def test_gray_of_sixteen_bits_is_scaled_to_eight(kind: str) -> None:
    decoded = decode_image(SIXTEEN_BITS[kind](), max_pixels=MANY)
    assert decoded.mode == "RGB"
    for channel in range(3):
        assert np.array_equal(np.asarray(decoded)[..., channel], GRAY // 256)


def test_gray_of_sixteen_bits_looks_like_the_same_picture_in_color_or_in_eight_bits() -> None:
    eight = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    for sixteen in (eight.astype(np.uint16) << 8, eight.astype(np.uint16) * 257):
        color = np.repeat(sixteen[..., None], 3, axis=2).astype(">u2").tobytes()
        header = struct.pack(">IIBBBBB", 7, 9, 16, 2, 0, 0, 0)
        rows = b"".join(b"\0" + color[at : at + 42] for at in range(0, len(color), 42))
        for data in (
            encoded(Image.fromarray(sixteen), "PNG"),
            png_of(header, rows),
            encoded(Image.fromarray(eight), "PNG"),
        ):
            assert np.array_equal(np.asarray(decode_image(data, max_pixels=MANY))[..., 0], eight)


def test_gray_of_twelve_bits_has_its_own_white() -> None:
    values = np.arange(0, 4096, 4).reshape(32, 32)
    decoded = decode_image(packed_twelve_bits(values), max_pixels=MANY)
    assert np.array_equal(np.asarray(decoded)[..., 0], values // 16)


def test_gray_of_sixteen_bits_whose_white_is_zero_is_turned_round() -> None:
    little = bytearray(encoded(Image.fromarray(GRAY), "TIFF"))
    at = little.index(struct.pack("<HHI", 262, 3, 1))
    little[at + 8] = 0
    assert np.array_equal(np.asarray(decode_image(bytes(little), max_pixels=MANY))[..., 0], 255 - GRAY // 256)


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("F", encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")),
        ("F", big_endian_tiff(np.full((4, 4), 0.5, np.float32), bits=32, sample_format=3)),
        ("F", b"Pf\n2 2\n-1.0\n" + np.full(4, 0.5, np.float32).tobytes()),
        ("I", encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")),
        ("I", big_endian_tiff(np.full((4, 4), -5, np.int16), sample_format=2)),
        ("I;16", encoded(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG")),
    ],
)
def test_a_mode_whose_white_is_not_known_is_refused_by_name(mode: str, data: bytes) -> None:
    with pytest.raises(BadSample, match=f"image is of mode {mode}[ ,]"):
        decode_image(data, max_pixels=MANY)


def test_black_of_sixteen_bits_is_black() -> None:
    assert decode_image(encoded(Image.new("I;16", (4, 4)), "PNG"), max_pixels=MANY).getpixel((0, 0)) == (0, 0, 0)


def test_an_image_too_narrow_for_the_model_is_refused_before_it_is_unpacked() -> None:
    for width, height, side in [(1, 80_000_000, None), (1, 80_000_000, 224), (2000, 1, 224)]:
        with pytest.raises(BadSample, match=rf"image is too narrow \({width} x {height} pixels\)"):
            decode_image(png_that_claims(width, height), max_pixels=89_478_485, side=side)
    data = encoded(noise(size=(40, 1)), "PNG")
    assert decode_image(data, max_pixels=40 * 32 * 32, side=32).size == (40, 1)
    with pytest.raises(BadSample, match="too narrow"):
        decode_image(data, max_pixels=40 * 32 * 32 - 1, side=32)


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
    with contextlib.suppress(BadSample):
        assert min(image_size(bytes(whole), max_pixels=MANY)) > 0


def test_the_size_is_that_of_the_header() -> None:
    assert image_size(png_that_claims(30, 40), max_pixels=1200) == (30, 40)
    with pytest.raises(BadSample, match=r"more pixels than pairs\.max_pixels 1,199"):
        image_size(png_that_claims(30, 40), max_pixels=1199)
