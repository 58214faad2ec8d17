"""Photos: decoding with bounds, and the one resize that training and serving share."""

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

LARGEST_FILE = 50_000_000
"""Bytes. Real photos have 4 to 100 kB."""
LARGEST_PHOTO = 40_000_000
"""Pixels. Asked before decoding, so that a small file cannot fill the memory."""
FORMATS = ("JPEG", "PNG", "WEBP")
PREPROCESSING_VERSION = 2
"""Raised when `decode` or `resize_to_square` give other pixels for the same bytes: caches are named after it."""
_ORIENTATION = 0x0112
_KEPT_QUALITY = 92
"""Of JPEGs that are kept smaller than they came."""

# Pillow warns of large or odd photos without naming them; here each is used, flagged or refused. Once for the process:
# catch_warnings is not for threads, and photos are checked in several
warnings.filterwarnings("ignore", module=r"PIL\.")


class PhotoError(Exception):
    """This photo cannot be used; the message is the reason given to the user."""


def decode_validated(data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The photo, upright, in RGB, and what was unusual about its file: png, webp, greyscale, cmyk, exif_rotated.

    Raises:
        PhotoError: empty, not an image, truncated, or too large.
    """
    if not data:
        raise PhotoError("photo is empty")
    if len(data) > LARGEST_FILE:
        raise PhotoError(f"photo has more than {LARGEST_FILE} bytes")
    try:
        photo = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise PhotoError("photo is not a JPEG, PNG or WebP image") from None
    except Exception as error:
        # Pillow's readers raise many kinds of errors on hostile bytes; each of them means the same here
        raise PhotoError(f"photo cannot be read: {error}") from None
    if photo.width * photo.height > LARGEST_PHOTO:
        raise PhotoError(f"photo has {photo.width}x{photo.height} pixels, more than {LARGEST_PHOTO}")
    flags = [photo.format.lower()] if photo.format not in (None, "JPEG") else []
    try:
        photo.load()
        if photo.mode == "CMYK":
            flags.append("cmyk")
        elif photo.mode in ("1", "L", "LA") or _is_16_bit(photo):
            flags.append("greyscale")
        if photo.getexif().get(_ORIENTATION, 1) != 1:
            flags.append("exif_rotated")
            ImageOps.exif_transpose(photo, in_place=True)
        return (_to_8_bit(photo) if _is_16_bit(photo) else photo).convert("RGB"), tuple(flags)
    except Exception as error:
        raise PhotoError(f"photo cannot be decoded: {error}") from None


def _is_16_bit(photo: Image.Image) -> bool:
    return photo.mode.startswith("I")


def _to_8_bit(photo: Image.Image) -> Image.Image:
    """A 16-bit greyscale photo, scaled; Pillow's own conversion clips at 255, which turns nearly all of it white."""
    return Image.fromarray((np.asarray(photo).astype(np.uint32) // 257).astype(np.uint8))


def shrink(data: bytes, short_side: int) -> bytes:
    """A JPEG of the photo, upright, with this short side in pixels; anything smaller, or no photo, stays as it is."""
    try:
        photo = decode(data)
    except PhotoError:  # kept: the manifest says what is wrong with it
        return data
    if min(photo.size) <= short_side:
        return data
    scale = short_side / min(photo.size)
    smaller = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=_KEPT_QUALITY)
    return file.getvalue()


def photo_key(data: bytes) -> str:
    """Content hash of a photo's bytes: what manifests and caches know it by."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def decode(data: bytes) -> Image.Image:
    """The photo, upright, in RGB; errors as `decode_validated`."""
    return decode_validated(data)[0]


def resize_to_square(photo: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """The photo as a network sees it: (size, size, 3), uint8, stretched to a square.

    About half of the real photos come stretched to a square already; so the others are too.
    """
    square = photo if photo.size == (size, size) else photo.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(square, dtype=np.uint8)
