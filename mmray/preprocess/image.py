"""Encoded image bytes -> uint8 pixels, [3, size, size].

The format is told by the content, never by a name. The pixel count is read from the header and
capped before anything is decoded. A JPEG is decoded at the smallest DCT scale that still covers
the target; then every picture is resized once, antialiased, by torch's uint8 kernel: within 1 of
Pillow's BILINEAR, bit for bit the same on every instruction set, and three to seven times faster.

Shape legend: H, W height and width in pixels; C = 3, the channels red, green, blue.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.PsdImagePlugin import PsdImageFile
from PIL.SpiderImagePlugin import SpiderImageFile
from PIL.TgaImagePlugin import TgaImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mmray.config import ImagePreprocess
from mmray.errors import BadRow

try:
    import simplejpeg
except ImportError:  # a speed-up: without it Pillow decodes the JPEGs too
    simplejpeg = None

EMPTY = "image empty"
UNRECOGNISED = "image not recognised"
UNSUPPORTED = "image format not supported"
TOO_LARGE = "image too large"
TRUNCATED = "image truncated"
CORRUPT = "image corrupt"

#: The formats that are read, in the order they are tried: those with a signature first, then the
#: two known only by the values in their header. Rasters that Pillow decodes in this process;
#: nothing that starts another program (EPS) and nothing met only in test suites.
READ = (
    JpegImageFile,  # with it MPO, several JPEGs in one file
    PngImageFile,
    WebPImageFile,
    GifImageFile,
    BmpImageFile,
    TiffImageFile,
    AvifImageFile,
    Jpeg2KImageFile,
    PsdImageFile,
    PpmImageFile,
    IcoImageFile,
    SpiderImageFile,
    TgaImageFile,
)

#: Formats that are told apart only to say that they are not read: offset, signature, name.
UNREAD = (
    (4, b"ftyp", "HEIF or a video"),
    (0, b"<", "SVG, or a web page"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"DDS ", "DDS"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
)

#: What a plugin raises for a header that is not its format's; ``Image.open`` has the same list.
NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)

#: How Pillow's decoders say that the data end too early.
TRUNCATION = ("truncated", "not enough", "next frame", "no more images", "only got", "at least")

#: EXIF tag 0x0112 (Exif 3.0, 4.6.5.1): how the stored picture must be turned to stand upright.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: A side of at least twice this many times the target is averaged down to it before the resize,
#: which still sees all it can use; large pictures then need no second copy.
OVERSAMPLING = 4


def decode_image(data: bytes, cfg: ImagePreprocess) -> np.ndarray:
    """The picture in ``data``: uint8 [3, size, size] (CHW), RGB, 0 to 255, a view of memory that
    lies as [size, size, 3]: so decoders give pictures, and so convolutions take them fastest.

    Upright (EXIF or XMP orientation applied), transparency over white, the first frame of
    several, more than 8 bits brought down to 8 (see ``_eight_bit``). The same bytes give the same
    array in every process of an installation.

    Raises BadRow at stage "image", for whatever is no picture or cannot be read whole; its reason
    is one of the six constants above. Raises MemoryError where the process has too little: that
    says nothing of the picture, which another process may decode.
    """
    if not data:
        raise BadRow("image", EMPTY)
    try:
        return _decode(data, cfg)
    except (BadRow, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like: the row is set aside, not the job
        raise _bad_row(error, data) from error


def _decode(data: bytes, cfg: ImagePreprocess) -> np.ndarray:
    image = _open(data)
    width, height = image.size
    if width * height > cfg.max_pixels:
        raise BadRow("image", TOO_LARGE, f"{width}x{height} pixels, cap {cfg.max_pixels}")
    pixels_hwc = _decode_jpeg(data, image, cfg)
    if pixels_hwc is None:
        pixels_hwc = _decode_any(image, cfg)
    pixels_chw = _resize(pixels_hwc, cfg.size)
    turn = UPRIGHT.get(_orientation(image))
    if turn is None:
        return pixels_chw
    # The target is square and the crop symmetric: turning the small picture is turning the large.
    upright = Image.fromarray(pixels_chw.transpose(1, 2, 0)).transpose(turn)
    return np.array(upright).transpose(2, 0, 1)


# --- header --------------------------------------------------------------------------------------


def _open(data: bytes) -> Image.Image:
    """The picture's header; nothing is decoded.

    Stands in for ``Image.open``, whose pixel limit is one global for all threads and half of it
    a mere warning; here ``cfg.max_pixels`` decides, at any value.
    """
    prefix = data[:16]
    broken = ""
    for name in (kind.format for kind in READ):
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if isinstance(accepted, str):  # the format, but this Pillow was built without its library
            raise BadRow("image", UNSUPPORTED, accepted)
        if not accepted:
            continue
        try:
            return factory(io.BytesIO(data), "")
        except NOT_THIS_FORMAT as error:
            if "cannot handle" in str(error):
                raise BadRow("image", UNSUPPORTED, f"{name}: {_line(error)}") from error
            if accept is not None:
                broken = broken or f"{name} header: {_line(error)}"
    if broken:
        raise BadRow("image", _truncated_or_corrupt(broken, data), broken)
    for offset, signature, name in UNREAD:
        if prefix.startswith(signature, offset):
            raise BadRow("image", UNSUPPORTED, name)
    raise BadRow("image", UNRECOGNISED, f"{len(data)} bytes that start with {prefix!r}")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded picture, 1 to 8; 1 (as stored) where none can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  damaged metadata beside an intact picture: shown as stored
        return 1


# --- decoding ------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, image: Image.Image, cfg: ImagePreprocess) -> np.ndarray | None:
    """A grey or colour JPEG, uint8 [H, W, 3]; None when it is Pillow's turn.

    Decoded at the smallest of the scales 1, 1/2, 1/4 and 1/8 that still covers the target:
    libjpeg-turbo has the eighths between too, but no vector code for them, and is slower there
    than at full size. Pillow is the judge of what is broken: whatever libjpeg-turbo so much as
    warns about goes there, where a truncated file is refused and a merely odd one is read.
    """
    if simplejpeg is None or image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    covering = min(image.size) // cfg.size
    scale = next((scale for scale in (8, 4, 2) if scale <= covering), 1)
    width, height = (-(-side // scale) for side in image.size)
    try:
        pixels_hwc: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width
        )
    except ValueError:
        return None
    left, top, right, bottom = _window(pixels_hwc.shape[1], pixels_hwc.shape[0], cfg)
    return np.ascontiguousarray(pixels_hwc[top:bottom, left:right])


def _decode_any(image: Image.Image, cfg: ImagePreprocess) -> np.ndarray:
    """Whatever Pillow reads, uint8 [H, W, 3]."""
    if image.format in ("JPEG", "MPO"):
        image.draft(image.mode, (cfg.size, cfg.size))
    image.load()
    window = _window(*image.size, cfg)
    if window != (0, 0, *image.size):
        image = image.crop(window)
    rgb = _rgb(image)
    enough = OVERSAMPLING * cfg.size
    width, height = (enough if side >= 2 * enough else side for side in rgb.size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    return np.array(rgb)


def _window(width: int, height: int, cfg: ImagePreprocess) -> tuple[int, int, int, int]:
    """The part that is kept: left, top, right, bottom in pixels.

    For ``crop`` the centre square, one pixel longer where the rest is odd, so that a mirrored
    picture keeps the mirrored window.
    """
    if cfg.resize == "squash":
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, width - left, height - top


def _rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, what is transparent over white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bit(image)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _eight_bit(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits -> uint8 [H, W].

    16 bits keep their high byte, as Pillow does for 16-bit colour. 32-bit integers within 0 to
    65535 count as 16 bits, floats within 0 to 1 as a share of full, floats within 0 to 255 as 8
    bits; any other range has no convention and is stretched from its least to its largest value.
    What is not a number is black.
    """
    grey = np.asarray(image)
    if image.mode.startswith("I;16"):
        high_byte = (grey >> 8).astype(np.uint8)
        key = image.info.get("transparency")  # PNG: the one grey that is transparent
        if isinstance(key, int):
            high_byte[grey == key] = 255
        return high_byte
    values = np.nan_to_num(grey.astype(np.float32), copy=False, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and low >= 0 and high <= 65535:
        return (values / 256).astype(np.uint8)
    if image.mode == "F" and low >= 0 and high <= 255:
        return (values * (255 if high <= 1 else 1) + 0.5).astype(np.uint8)
    return ((values - low) * (255 / ((high - low) or 1)) + 0.5).astype(np.uint8)


def _resize(pixels_hwc: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [3, size, size] in the same memory order, bilinear with
    antialiasing."""
    import torch  # here, because most of what imports this module never decodes

    stored = torch.from_numpy(pixels_hwc)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        stored, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    in_order: np.ndarray = resized[0].permute(1, 2, 0).contiguous().numpy()
    return in_order.transpose(2, 0, 1)


# --- errors --------------------------------------------------------------------------------------


def _bad_row(error: Exception, data: bytes) -> BadRow:
    """A decoder's exception as a row's reason."""
    text = _line(error)
    if isinstance(error, Image.DecompressionBombError):
        return BadRow("image", TOO_LARGE, text)
    if isinstance(error, NotImplementedError):
        return BadRow("image", UNSUPPORTED, text)
    return BadRow("image", _truncated_or_corrupt(text, data), text)


def _truncated_or_corrupt(text: str, data: bytes) -> str:
    """Which of the two: by the decoder's own words, or a WebP's stated length."""
    short = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    return TRUNCATED if short or any(hint in text.lower() for hint in TRUNCATION) else CORRUPT


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
