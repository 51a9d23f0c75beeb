"""Decoding of images that come from outside: one place that knows what decoders do with odd, damaged and hostile files.

Bytes of a JPEG, PNG, WebP, GIF, BMP or AVIF come in; upright 8-bit RGB goes out, as an array (training) or a PIL image
(evaluation, LLaVA), the same pixels in both. What cannot be decoded whole is an `ImageFault`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MAX_IMAGE_PIXELS = 1024**3 // 4 // 3
"""Larger images are refused by their header: 89 M pixels are 256 MiB of RGB in each loader worker, and PIL's own alarm."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""What the web holds. PIL's other readers only widen the attack (EPS starts Ghostscript) or have no set 8-bit range (TIFF)."""

_JPEG_START = b"\xff\xd8\xff"


class ImageFault(ValueError):
    """The bytes are not a whole image that can be decoded; the message says what was found."""


def image_fault(error: OSError | ImageFault) -> tuple[str, str]:
    """Cause and detail for the drop ledger, of what reading and decoding an image raised."""
    cause = "undecodable image" if isinstance(error, ImageFault) else "unreadable image"
    return "missing image" if isinstance(error, FileNotFoundError) else cause, f"{type(error).__name__}: {error}"


def decode_image(source: Path | bytes) -> Image.Image:
    """RGB image with the pixels of `decode_rgb`.

    Raises:
        ImageFault: as `decode_rgb`, or the file cannot be read.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ImageFault(f"{type(error).__name__}: {error}") from error
    return Image.fromarray(decode_rgb(source))


def decode_rgb(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3], decoded to its end and turned upright by its EXIF (or XMP) orientation.

    Transparent pixels are laid on white, as img2dataset does and a browser shows them; without that, whatever colour lies
    under them would appear. 16-bit levels keep their high byte. Of an animation the first frame is taken. CMYK is read as
    Adobe writes it (inverted), as PIL and browsers do. Colour profiles are ignored.

    Raises:
        ImageFault: no image in `FORMATS`, more than `MAX_IMAGE_PIXELS`, or damaged. For a JPEG that includes what PIL fills
            with grey or noise and calls whole: data that end early, also behind a proper end marker, and bad Huffman codes.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # libraries switch it on for everyone (lmms-eval does); half an image is a fault
    try:
        return _decode_jpeg(content) if content.startswith(_JPEG_START) else _decode_with_pil(content)
    except ImageFault:
        raise
    except UnidentifiedImageError as error:
        what = f"{len(content)} bytes that begin with {content[:8]!r}" if content else "an empty file"
        raise ImageFault(f"expected a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image, found {what}") from error
    except Exception as error:  # on hostile bytes PIL's readers raise nearly anything, and no document lists it
        raise ImageFault(f"{type(error).__name__}: {error}") from error


def _decode_jpeg(content: bytes) -> np.ndarray:
    """By libjpeg-turbo: bit-identical to PIL, 3 times faster, and it reports damage that PIL conceals."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:  # no header, or a rare one (unusual sampling factors, 12 bits): PIL decodes it or says why not
        return _decode_with_pil(content)
    _check_size(width, height)
    is_cmyk = colour_space in ("CMYK", "YCCK")
    target = "CMYK" if is_cmyk else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(content, target)
    except ValueError as error:
        # only the first warning is reported; if that is of bytes left over before the end marker, every block was decoded
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
        pixels = simplejpeg.decode_jpeg(content, target, strict=False)
    if is_cmyk:
        pixels = np.array(Image.fromarray(255 - pixels, "CMYK").convert("RGB"))
    if b"Exif\0\0" not in content and b"tiff:Orientation" not in content:  # spares most files PIL's slow header reader
        return pixels
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return _upright(pixels, image)


def _decode_with_pil(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        _check_size(image.width, image.height)
        image.load()
        return _upright(_rgb(image), image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageFault(f"{width} x {height} pixels are more than the limit of {MAX_IMAGE_PIXELS:,}")


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips to white
        levels = np.asarray(image)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == image.info.get("transparency", -1)] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return np.array(image.convert("RGB"))


def _upright(pixels_HW3: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turned and mirrored as the orientation tag of `image` asks. Unreadable metadata ask for nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels are whole whatever the metadata look like
        orientation = None
    if orientation in (5, 6, 7, 8):
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_HW3 = pixels_HW3[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HW3 = pixels_HW3[:, ::-1]
    return np.ascontiguousarray(pixels_HW3)
