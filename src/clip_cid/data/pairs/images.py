"""Image bytes to RGB pixels, as open_clip sees them, with broken and hostile files refused."""

import contextlib
import io
import warnings
from collections.abc import Generator

from PIL import Image, ImageFile

from clip_cid.data.pairs.pair import BadSample

# Raster formats only: Pillow opens many more, and hands PostScript to an outside program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image in RGB: first frame, alpha dropped and orientation ignored, exactly as open_clip's preprocessing does.

    Raises:
        BadSample: Not an image of a known format, broken, cut short, or of more than `max_pixels` pixels.
    """
    if not data:
        raise BadSample("image is empty (0 bytes)")
    with _strict_pillow(max_pixels):
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise BadSample(_too_large(image.width * image.height, max_pixels))
                return image.convert("RGB")
        except (BadSample, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadSample(_too_large(None, max_pixels)) from error
        except Image.UnidentifiedImageError as error:
            raise BadSample(f"image is of no known format ({len(data):,} bytes)") from error
        except Exception as error:  # on broken bytes Pillow's decoders raise nearly everything there is
            raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from error


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
