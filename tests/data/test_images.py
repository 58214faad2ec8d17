"""Photos: any bytes are a photo or a reason, and no small file fills the memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stocktake.data.images import LARGEST_FILE, PhotoError, decode, decode_validated, photo_key, resize_to_square


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [60_000, 9_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, bin_photo: Callable[..., bytes]) -> None:
    data = bomb(side, side)
    decode_validated(bin_photo(1, format="PNG"))  # Pillow loads its readers with the first photo
    tracemalloc.start()
    with pytest.raises(PhotoError, match="pixels"):
        decode_validated(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) < 1_000
    assert peak < 1_000_000


def test_a_file_larger_than_any_photo_is_refused(bin_photo: Callable[..., bytes]) -> None:
    with pytest.raises(PhotoError, match="more than"):
        decode_validated(bin_photo(1) + bytes(LARGEST_FILE))


@pytest.mark.parametrize(
    ("format", "mode", "flags"),
    [
        ("JPEG", "RGB", ()),
        ("JPEG", "L", ("greyscale",)),
        ("JPEG", "CMYK", ("cmyk",)),
        ("PNG", "RGB", ("png",)),
        ("PNG", "RGBA", ("png",)),
        ("PNG", "1", ("png", "greyscale")),
        ("WEBP", "RGB", ("webp",)),
    ],
)
def test_unusual_photos_are_used_and_flagged(
    format: str, mode: str, flags: tuple[str, ...], bin_photo: Callable[..., bytes]
) -> None:
    photo, unusual = decode_validated(bin_photo(1, format=format, mode=mode))
    assert (photo.mode, photo.size, unusual) == ("RGB", (48, 40), flags)


@pytest.mark.parametrize("orientation", [None, 3])
def test_a_16_bit_greyscale_photo_is_scaled(orientation: int | None) -> None:
    levels = np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", exif=exif)
    photo, flags = decode_validated(file.getvalue())
    upright = levels[::-1, ::-1] if orientation else levels
    assert np.abs(np.asarray(photo).astype(int) - (upright / 257)[..., None]).max() <= 1
    assert "greyscale" in flags


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotated_photo_is_turned_upright(orientation: int) -> None:
    """The red corner of the scene is in its top left, wherever the camera's sensor had it."""
    stored_at = {2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "bl", 7: "br", 8: "tr"}[orientation]
    pixels = np.zeros((40, 48, 3), dtype=np.uint8)
    rows = slice(0, 16) if stored_at[0] == "t" else slice(24, 40)
    columns = slice(0, 16) if stored_at[1] == "l" else slice(32, 48)
    pixels[rows, columns, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    photo, flags = decode_validated(file.getvalue())
    assert flags == ("exif_rotated",)
    assert photo.size == ((40, 48) if orientation >= 5 else (48, 40))
    reds = np.asarray(photo)[..., 0] > 128
    assert reds[:12, :12].all()
    assert not reds[20:, 20:].any()


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"%PDF-1.4", b"\xff\xd8\xff", b"<svg/>", bytes(500)])
def test_what_is_no_photo_is_refused_with_the_reason(data: bytes) -> None:
    with pytest.raises(PhotoError, match=r"^photo (is empty|is not a JPEG|cannot be)"):
        decode_validated(data)


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x90\0\0\0WEBP"])
)
def test_any_bytes_are_a_photo_or_refused(data: bytes, start: bytes) -> None:
    try:
        decode_validated(start + data)
    except PhotoError as error:
        assert str(error).startswith("photo ")


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_photo_is_a_photo_or_refused(bin_photo: Callable[..., bytes], data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    whole = bytearray(bin_photo(1, format=format, orientation=6))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        photo = decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except PhotoError as error:
        assert str(error).startswith("photo ")
    else:
        assert photo.mode == "RGB"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_photo_is_refused(format: str, bin_photo: Callable[..., bytes]) -> None:
    whole = bin_photo(1, format=format)
    for kept in (10, len(whole) // 2, len(whole) - 40):
        with pytest.raises(PhotoError):
            decode(whole[:kept])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 64))
def test_resizing_gives_a_square_of_bytes(width: int, height: int, side: int) -> None:
    colour = (10, 200, 90)
    prepared = resize_to_square(Image.new("RGB", (width, height), colour), side)
    assert (prepared.shape, prepared.dtype) == ((side, side, 3), np.uint8)
    assert (prepared == colour).all()


def test_a_photo_of_the_size_is_not_resized_and_its_key_is_of_its_bytes(bin_photo: Callable[..., bytes]) -> None:
    photo = decode(bin_photo(1, size=(32, 32)))
    assert (resize_to_square(photo, 32) == np.asarray(photo)).all()
    keys = [photo_key(bin_photo(seed)) for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]
