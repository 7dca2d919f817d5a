"""Image bytes to RGB pixels, as open_clip sees them, with broken and hostile files refused.

This is the one place where images are decoded: for embedding, training, evaluation and pictures.
"""

import contextlib
import io
import warnings
from collections.abc import Generator

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from clip_cid.data.pairs.pair import BadSample

# Raster formats that begin with a mark of their own: Pillow opens many more, takes any bytes for some of them, and hands
# PostScript to an outside program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")

EXTENSIONS = (
    *("jpg", "png", "jpeg", "webp"),
    *("avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpx", "pgm", "ppm", "qoi", "tif", "tiff"),
)
"""Of files that are images, in small letters. A sample with several has the first: those of open_clip, in its order."""

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_NARROWEST = 4_000  # the longer side over the shorter: at 224 pixels, three times the usual `max_pixels`
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


def decode_image(data: bytes, *, max_pixels: int, side: int | None = None) -> Image.Image:
    """The image in RGB: first frame, alpha dropped and orientation ignored, exactly as open_clip's preprocessing does.

    Sixteen bits of gray are scaled to eight, which Pillow cuts off at 255 instead: nearly all would be white.

    Args:
        data: The file.
        max_pixels: An image that claims more pixels is refused.
        side: The side to which the shorter one will be resized, if it is known. An image so narrow that it would then
            have more than `max_pixels` is refused before it is decoded.

    Raises:
        BadSample: Not an image of a known format, broken, cut short, too large, or of a mode whose white is not known.
    """
    with _opened(data, max_pixels, side) as image:
        return _rgb(image)


def image_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height as the header of a file says; nothing is decoded.

    Raises:
        BadSample: Not an image of a known format, broken, or too large.
    """
    with _opened(data, max_pixels, None) as image:
        return image.size


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int, side: int | None) -> Generator[Image.Image]:
    """The image while it is read; whatever fails is a `BadSample`."""
    if not data:
        raise BadSample("image is empty (0 bytes)")
    with _strict_pillow(max_pixels):
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image.size, max_pixels, side)
                yield image
        except (BadSample, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadSample(_too_large(None, max_pixels)) from error
        except Image.UnidentifiedImageError as error:
            raise BadSample(f"image is of no known format ({len(data):,} bytes)") from error
        except Exception as error:  # on broken bytes Pillow's decoders raise nearly everything there is
            raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from error


def _check_size(size: tuple[int, int], max_pixels: int, side: int | None) -> None:
    """Refuse what the header says, before anything is unpacked."""
    if size[0] * size[1] > max_pixels:
        raise BadSample(_too_large(size[0] * size[1], max_pixels))
    ratio = max(size) / max(1, min(size))
    if ratio > _NARROWEST or (side is not None and ratio * side * side > max_pixels):
        raise BadSample(f"image is too narrow ({size[0]} x {size[1]} pixels)")


def _rgb(image: Image.Image) -> Image.Image:
    # Netpbm of more than 8 bits is of mode I too; Pillow has then scaled it to 16 bits.
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_sixteen_bits(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point"
        raise BadSample(f"image is of mode {image.mode} ({kind}), whose black and white are not known")
    return image.convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """The highest 8 bits of each value, which is also how Pillow reads colors of 16 bits."""
    bits, inverted = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0])
        inverted = image.tag_v2.get(_PHOTOMETRIC) == 0  # white is zero, which Pillow minds for fewer bits only

    values = np.asarray(image)
    largest = int(values.max(initial=0))
    if 0 < largest < 1 << (bits - 8):
        raise BadSample(f"image is of mode {image.mode}, and black in 8 bits: no value of its {bits} is over {largest}")
    gray = np.minimum(values >> (bits - 8), 255).astype(np.uint8)
    return Image.fromarray(255 - gray if inverted else gray).convert("RGB")


def _too_large(pixels: int | None, max_pixels: int) -> str:
    size = "more pixels" if pixels is None else f"{pixels:,} pixels, more"
    return f"image claims {size} than pairs.max_pixels {max_pixels:,}"


@contextlib.contextmanager
def _strict_pillow(max_pixels: int) -> Generator[None]:
    """Set Pillow's process-wide switches, and restore them afterwards (another library may use them)."""
    limit, lenient = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        # Transparent palettes and odd EXIF blocks only make Pillow warn; open_clip converts them too.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, lenient
