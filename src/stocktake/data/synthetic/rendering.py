"""Draws what a photo of a bin shows: the fabric compartment, the goods in it, the elastic bands before them.

Everything is drawn at the photo's own resolution with Pillow, from textures made once a process, so that a
photo costs some ten milliseconds. All randomness comes from the generators and seeds that are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")


def _palette(text: str) -> tuple[Colour, ...]:
    return tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in text.split())


TILE = 1024  # side of the texture tiles, crops of which are pasted
_LEAST = 10  # pixels: the smallest side of an item on which its printed frame still fits
THREADS = 30  # in the widest elastic strip
LABELS = _palette("3f3a5c d6844c cd5c50 d0948e 7c9cbe 5c5c64 56344e 6e5242")
INKS = _palette(
    "ac3028 26447e c8702c 346446 26262a 1e1e24 38383e bcb8ae c0beb6 c4c0b8 b4a044 62304e 4a8290 c08492 70706e"
)
WORDS = ("ULTRA", "CARE", "Vita", "Joy", "PRO", "Home", "SOFT", "Nature", "KIDS", "MAX", "Pure", "Sport", "LED", "GOLD")
TEXT = np.array([[0.0] * 4, [0.9] * 4, [0.9] * 4, [0.0] * 4, [0.0] * 4])  # a bit of a line, unreadably small
BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Product:
    """A kind of article: what it looks like follows from its seed. Sizes in inches, as seen from the front."""

    asin: str
    kind: str
    width: float
    height: float
    depth: float
    seed: int


@dataclass(frozen=True)
class Compartment:
    """The part of a pod that a bin is: inner sizes in inches, and the seed of fabric, bands, label and camera."""

    width: float
    height: float
    square: bool
    seed: int


@dataclass(frozen=True)
class Pose:
    """Where one item is, in inches from the compartment's left wall and floor; `back` is 1 at the back wall."""

    product: Product
    left: float
    lift: float
    back: float
    angle: float
    flipped: bool


def _smooth(rng: Generator, cell: int, side: int = TILE) -> NDArray[np.float32]:
    """Noise in 0..1 whose bumps are about `cell` pixels wide."""
    coarse = Image.fromarray(rng.integers(0, 256, (side // cell + 3, side // cell + 3), np.uint8))
    return (np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 255).astype(np.float32)


def _grey(values: NDArray[np.number]) -> Image.Image:
    return Image.fromarray(np.clip(values * 255, 0, 255).astype(np.uint8))


def _band(rng: Generator) -> Image.Image:
    """An elastic strip as an alpha mask: parallel pale threads in a thin haze, 512 px by THREADS."""
    rows = np.full((THREADS * 8, 512), rng.uniform(0.12, 0.28), np.float32)
    ripple = _smooth(rng, 40, 512)
    for k in range(THREADS):
        strength = rng.uniform(0.35, 0.8)
        dashes = 0.8 + 0.2 * np.sin(np.arange(512, dtype=np.float32) * rng.uniform(0.5, 1.1))
        rows[k * 8 + 3 : k * 8 + 6] += strength * dashes * (0.65 + 0.5 * ripple[k * 16])
    return _grey(rows)


def _written(text: str, height: int = 22) -> Image.Image:
    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    return mask


class _Textures:
    def __init__(self) -> None:
        rng = default_rng(20160801)
        weave = 0.9 + 0.022 * rng.standard_normal((TILE, TILE), np.float32) + 0.3 * (_smooth(rng, 110) - 0.5)
        weave[:, ::3] -= 0.025
        weave[::3] -= 0.025
        self.fabric = _grey(weave)
        self.clouds = _smooth(rng, 150)
        self.noise = rng.standard_normal((TILE, TILE, 3), np.float32)
        colours = np.stack([_smooth(rng, 26) * 0.6 + _smooth(rng, 9) * 0.4 for _ in range(3)], -1)
        colours = 0.3 * colours + 0.7 * colours.mean(-1, keepdims=True)
        self.art = Image.fromarray((np.clip(colours * 2.2 - 0.65, 0, 0.75) * 255).astype(np.uint8))
        folds = np.maximum(*(1 - np.abs(_smooth(rng, cell) - 0.5) * 11 for cell in (11, 23)))
        self.crinkle = _grey(folds * (0.16 + 0.95 * _smooth(rng, 30)) + 0.2 * (_smooth(rng, 6) - 0.5))
        self.bands = [_band(rng) for _ in range(8)]
        self.words = [_written(word) for word in WORDS]
        self.paragraphs = [_grey(np.kron(rng.random((10, 20)) < 0.72, TEXT)) for _ in range(8)]
        self.barcodes = [_grey(np.tile(np.repeat(rng.integers(0, 2, 30), 2), (22, 1))) for _ in range(6)]
        self.codes = [_grey(np.kron(rng.integers(0, 2, (12, 12)), np.full((2, 2), 0.9))) for _ in range(6)]
        edge = np.clip(np.minimum(np.arange(48), np.arange(48)[::-1]) / 14, 0, 1)
        self.soft = _grey(np.outer(edge, edge))
        down, aside = np.linspace(1, 0, 48)[:, None], np.abs(np.linspace(-1, 1, 48))
        self.shade = _grey(0.15 + 0.6 * down**0.8 + 0.25 * aside**3)
        self.round = _grey(np.tile(np.abs(np.linspace(-1.15, 0.85, 64)) ** 1.8 * 0.62, (8, 1)))


_textures = cache(_Textures)  # once a process


def _pick(rng: Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _tint(colour: Sequence[float], factor: float) -> Colour:
    red, green, blue = (min(255, int(c * factor)) for c in colour)
    return red, green, blue


def _crop(tile: Image.Image, rng: Generator, width: int, height: int) -> Image.Image:
    x, y = (int(rng.integers(0, TILE - min(side, TILE) + 1)) for side in (width, height))
    return tile.crop((x, y, x + width, y + height))


def _sized(mask: Image.Image, width: float, height: float) -> Image.Image:
    return mask.resize((max(2, round(width)), max(2, round(height))), BILINEAR)


def _stamp(face: Image.Image, mask: Image.Image, colour: Colour, box: tuple[float, float, float, float]) -> None:
    """Paint `colour` through `mask`, stretched to the box (left, top, width, height), a fraction of the face."""
    width, height = face.size
    face.paste(colour, (round(box[0] * width), round(box[1] * height)), _sized(mask, box[2] * width, box[3] * height))


def _sticker(face: Image.Image, rng: Generator) -> None:
    """The white label with a bar code that every article gets on arrival: one size, whiter than any print."""
    width, height = face.size
    wide, high = min(0.9, 30 / width), min(0.8, 17 / height)
    x, y = rng.uniform(0.04, 0.96 - wide), rng.uniform(0.04, max(0.05, 0.5 - high))
    box = (x * width, y * height, (x + wide) * width, (y + high) * height)
    ImageDraw.Draw(face).rectangle(box, fill=(255, 255, 252))
    _stamp(
        face, _pick(rng, _textures().barcodes), (40, 40, 44), (x + wide * 0.1, y + high * 0.2, wide * 0.8, high * 0.4)
    )


def _printed(rng: Generator, width: int, height: int, base: Colour, ink: Colour) -> Image.Image:
    """A printed face: a ground, blocks or a picture, a title, lines of small text."""
    textures = _textures()
    face = Image.new("RGB", (width, height), base)
    draw = ImageDraw.Draw(face)
    style = rng.random()
    if style < 0.35:
        y = rng.uniform(0, 0.7) * height
        draw.rectangle((0, y, width, y + rng.uniform(0.12, 0.5) * height), fill=ink)
    elif style < 0.5:
        draw.rectangle((4, 4, width - 4, height - 4), outline=ink, width=3)
    if rng.random() < 0.5:
        w, h = 2 + int(width * rng.uniform(0.35, 0.8)), 2 + int(height * rng.uniform(0.25, 0.55))
        art = Image.blend(_crop(textures.art, rng, w, h), Image.new("RGB", (w, h), ink), 0.35)
        face.paste(art, (int(rng.uniform(0, width - w)), int(rng.uniform(0, height - h))))
    if rng.random() < 0.4:
        x, y, r = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height, 0.2 * min(width, height)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_pick(rng, INKS))
    contrast, word = (196, 192, 184) if sum(base) < 330 else _tint(ink, 0.7), _pick(rng, textures.words)
    if height > 1.8 * width:
        word = word.transpose(Image.Transpose.ROTATE_90)
        _stamp(face, word, contrast, (0.2, rng.uniform(0.05, 0.35), 0.6, 0.5))
    else:
        _stamp(face, word, contrast, (rng.uniform(0.05, 0.25), rng.uniform(0.05, 0.5), 0.65, rng.uniform(0.12, 0.3)))
    _stamp(face, _pick(rng, textures.paragraphs), contrast, (rng.uniform(0.05, 0.4), rng.uniform(0.4, 0.7), 0.5, 0.25))
    return face


def _cylinder(rng: Generator, width: int, height: int, base: Colour, ink: Colour) -> Image.Image:
    """A bottle or a jar: body, shoulder and cap, a label round the body, shaded like a cylinder."""
    shape = Image.new("L", (width, height))
    draw = ImageDraw.Draw(shape)
    cap, neck = rng.uniform(0.1, 0.2) * height, rng.uniform(0.16, 0.34) * width * (height > 1.1 * width)
    shoulder = cap + rng.uniform(0.04, 0.16) * height
    draw.rectangle((neck, 0, width - neck, cap), fill=255)
    draw.polygon(((neck + 2, cap), (width - neck - 2, cap), (width, shoulder), (0, shoulder)), fill=255)
    draw.rounded_rectangle((0, shoulder - 1, width - 1, height - 1), radius=width * 0.08, fill=255)
    body = Image.new("RGB", (width, height), base)
    ImageDraw.Draw(body).rectangle((0, 0, width, cap), fill=ink)
    top, bottom = int(shoulder + 0.08 * height), int(height * 0.92)
    pale = (196, 190, 180) if rng.random() < 0.5 else _pick(rng, INKS)
    body.paste(_printed(rng, width, max(4, bottom - top), pale, ink), (0, top))
    body.paste((12, 10, 8), (0, 0), _sized(_textures().round, width, height))
    body.putalpha(shape)
    return body


def _polybag(rng: Generator, width: int, height: int, base: Colour, ink: Colour) -> Image.Image:
    """A polythene bag: a soft outline, what is in it seen through folds that shine."""
    textures = _textures()
    turn = np.exp(2j * np.pi * (np.arange(28) + rng.uniform(-0.2, 0.2, 28)) / 28)
    power, reach = rng.uniform(0.35, 0.6), rng.uniform(0.45, 0.5, 28)
    x, y = (0.5 + np.sign(part) * np.abs(part) ** power * reach for part in (turn.real, turn.imag))
    outline = list(zip((x * width).tolist(), (y * height).tolist(), strict=True))
    shape = Image.new("L", (width, height))
    ImageDraw.Draw(shape).polygon(outline, fill=int(rng.uniform(190, 255)))
    shape = shape.filter(ImageFilter.BoxBlur(1))
    body = Image.blend(Image.new("RGB", (width, height), base), _crop(textures.art, rng, width, height), 0.22)
    if rng.random() < 0.6:
        inner = _printed(rng, max(8, int(width * 0.6)), max(8, int(height * 0.6)), ink, base)
        body.paste(inner, (int(width * rng.uniform(0.15, 0.3)), int(height * rng.uniform(0.15, 0.3))))
    shine = ImageChops.multiply(_crop(textures.crinkle, rng, width, height), Image.new("L", (width, height), 190))
    body.paste((200, 196, 188), (0, 0), shine)
    body.putalpha(shape)
    return body


def _sprite(product: Product, width: int, height: int) -> Image.Image:
    """The front of the product, `width` x `height` pixels, the same for every one of its items."""
    rng = default_rng(product.seed)
    base, ink = _tint(_pick(rng, INKS), rng.uniform(0.75, 1.1)), _pick(rng, INKS)
    if product.kind == "carton":
        base, ink = _tint((150, 116, 84), rng.uniform(0.8, 1.1)), (84, 62, 44)
    if product.kind == "bottle":
        face = _cylinder(rng, width, height, base, ink)
    elif product.kind == "bag":
        face = _polybag(rng, width, height, base, ink)
    else:
        face = _printed(rng, width, height, base, ink)
    _sticker(face, rng)
    if face.mode == "RGB":
        ImageDraw.Draw(face).rectangle((0, 0, width - 1, height - 1), outline=_tint(base, 0.6))
    return face


class View(NamedTuple):
    """The camera: where the compartment's opening and its vanishing point lie in the photo, in pixels."""

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    vanish: Point
    depth: float

    def towards_back(self, point: Point, share: float) -> Point:
        k = share * self.depth
        return point[0] + (self.vanish[0] - point[0]) * k, point[1] + (self.vanish[1] - point[1]) * k


def place_camera(room: Compartment, size: int, fixed: Generator, rng: Generator) -> View:
    aspect = 1.0 if room.square else room.width / room.height
    width, height = round(size * max(aspect, 1)), round(size * max(1 / aspect, 1))
    right, down, zoom = rng.normal(0, 0.012, 3)
    sides, top, bottom = fixed.uniform(-0.04, 0.05, 2), fixed.uniform(0.03, 0.13), fixed.uniform(0.05, 0.16)
    opening = (sides[0] + right - zoom, top + down - zoom, 1 - sides[1] + right + zoom, 1 - bottom + down + zoom)
    left, top, right, bottom = (float(k * side) for k, side in zip(opening, (width, height) * 2, strict=True))
    vanish = (width * fixed.uniform(0.35, 0.65), height * fixed.uniform(0.1, 0.4))
    return View(width, height, left, top, right, bottom, vanish, fixed.uniform(0.14, 0.26))


def draw_room(view: View, fixed: Generator) -> Image.Image:
    base = _tint((208, 180, 112), fixed.uniform(0.92, 1.05))
    photo = Image.new("RGB", (view.width, view.height), base)
    draw = ImageDraw.Draw(photo)
    front = [(view.left, view.top), (view.right, view.top), (view.right, view.bottom), (view.left, view.bottom)]
    rear = [view.towards_back(corner, 1) for corner in front]
    floor = _tint((166, 146, 112), fixed.uniform(0.85, 1.05))
    for a, colour in enumerate((_tint(base, 0.62), _tint(base, 0.8), floor, _tint(base, fixed.uniform(0.7, 0.88)))):
        draw.polygon((front[a], front[a - 3], rear[a - 3], rear[a]), fill=colour)
    draw.polygon(rear, fill=_tint(base, fixed.uniform(0.78, 0.9)))
    cloth = _crop(_textures().fabric, fixed, view.width, view.height)
    return ImageChops.multiply(photo, Image.merge("RGB", (cloth, cloth, cloth)))


def draw_item(photo: Image.Image, view: View, room: Compartment, pose: Pose, sprites: dict[str, Image.Image]) -> None:
    scale = 1 - view.depth * pose.back
    across = (view.right - view.left) / room.width
    up = (view.bottom - view.top) / room.height
    product = pose.product
    wide, high = max(5.0, product.width * across * scale), max(5.0, product.height * up * scale)
    foot = view.left + (pose.left + product.width / 2) * across, view.bottom - 0.015 * view.height
    x, y = view.towards_back(foot, pose.back)
    y -= pose.lift * up * scale
    sine, cosine = math.sin(math.radians(pose.angle)), math.cos(math.radians(pose.angle))
    y -= abs(sine) * wide / 2
    frame = ((-wide / 2, -high), (wide / 2, -high), (wide / 2, 0.0), (-wide / 2, 0.0))
    corners = [(x + dx * cosine - dy * sine, y + dx * sine + dy * cosine) for dx, dy in frame]
    left, top = (math.floor(min(axis)) for axis in zip(*corners, strict=True))
    right, bottom = (math.ceil(max(axis)) + 1 for axis in zip(*corners, strict=True))
    size = right - left, bottom - top
    shadow = _sized(_textures().soft, size[0] + 16, size[1] + 12).point(lambda v: v * 0.55)
    photo.paste((34, 27, 20), (left - 8, top - 3), shadow)
    if product.asin not in sprites:
        sprites[product.asin] = _sprite(product, max(_LEAST, round(wide)), max(_LEAST, round(high)))
    sprite = sprites[product.asin]
    sprite = sprite.transpose(Image.Transpose.ROTATE_180) if pose.flipped else sprite
    if sprite.mode == "RGB":
        draw = ImageDraw.Draw(photo)
        rear = [view.towards_back(corner, min(0.9, product.depth / 14)) for corner in corners]
        side = np.asarray(sprite)[2, sprite.width // 2].tolist()
        for (a, b), light in (((0, 3), 0.5), ((1, 2), 0.62), ((0, 1), 0.85)):
            draw.polygon((corners[a], corners[b], rear[b], rear[a]), fill=_tint(side, light))
        sprite = sprite.convert("RGBA")
    kx, ky = sprite.width / wide, sprite.height / high
    dx, dy = left - x, top - y
    across_row = (cosine * kx, sine * kx, (dx * cosine + dy * sine + wide / 2) * kx)
    down_row = (-sine * ky, cosine * ky, (dy * cosine - dx * sine + high) * ky)
    sprite = sprite.transform(size, Image.Transform.AFFINE, (*across_row, *down_row), BILINEAR)
    photo.paste(sprite, (left, top), sprite)


def draw_shade(photo: Image.Image, view: View, strength: float) -> None:
    """The lip above and the goods themselves keep the light out: the opening is darkest at its top."""
    shade = _sized(_textures().shade, view.right - view.left, view.bottom - view.top).point(lambda v: v * strength)
    photo.paste((30, 23, 17), (round(view.left), round(view.top)), shade)


def draw_label(photo: Image.Image, view: View, fixed: Generator, upper: bool) -> None:
    """A lip of fabric at the top or the bottom edge, with the bin's label: a name, an arrow, a square code."""
    base = _tint((222, 196, 118), fixed.uniform(0.94, 1.06))
    sag = view.height * fixed.uniform(0.0, 0.03)
    y = view.top if upper else view.bottom
    edge = [(k * view.width / 8, y + sag * (4 - abs(k - 4)) / 4 * (-1 if upper else 1)) for k in range(9)]
    border = -4 if upper else view.height + 4
    draw = ImageDraw.Draw(photo)
    draw.polygon([(0, border), *edge, (view.width, border)], fill=base)
    draw.line(edge, fill=_tint(base, 0.72), width=2)
    wide, high = view.width * fixed.uniform(0.24, 0.36), view.height * fixed.uniform(0.1, 0.13)
    left = view.width * fixed.uniform(0.1, 0.6)
    top = y - high * fixed.uniform(0.95, 1.1) if upper else y + sag + high * fixed.uniform(0.05, 0.2)
    colour = _pick(fixed, LABELS)
    draw.rounded_rectangle((left, top, left + wide, top + high), 3, fill=colour, outline=(226, 214, 178))
    draw.rectangle((left + wide * 0.06, top + high * 0.15, left + wide * 0.56, top + high * 0.8), fill=(228, 224, 214))
    name = _written(_pick(fixed, "1234") + _pick(fixed, "ABCDEFGHIJ"))
    photo.paste((44, 44, 52), (int(left + wide * 0.09), int(top + high * 0.24)), _sized(name, wide * 0.32, high * 0.5))
    x, y = left + wide * 0.49, top + high * 0.25
    draw.polygon(((x, y), (x - 4, y + high * 0.22), (x + 4, y + high * 0.22)), fill=(44, 44, 52))
    draw.line((x, y, x, y + high * 0.48), fill=(44, 44, 52), width=2)
    code = _sized(_pick(fixed, _textures().codes), wide * 0.2, high * 0.75)
    photo.paste(code.convert("RGB"), (int(left + wide * 0.66), int(top + high * 0.12)))


def draw_bands(photo: Image.Image, view: View, fixed: Generator, rng: Generator) -> None:
    """Elastic strips across the opening: one wide curtain, or two or three narrow strips."""
    thick = fixed.uniform(0.12, 0.24)
    sparse = [(centre + fixed.uniform(-0.03, 0.03), thick) for centre in (0.15, 0.47, 0.8)]
    curtain, apron = [(fixed.uniform(0.3, 0.45), fixed.uniform(0.5, 0.7))], [(0.74, fixed.uniform(0.3, 0.45))]
    strips = _pick(fixed, (curtain, curtain, apron, sparse[::2], sparse[::2], sparse[::2], sparse, sparse))
    high = view.bottom - view.top
    colour = _tint((172, 158, 142), fixed.uniform(0.9, 1.1))
    pitch = view.height / 224 * fixed.uniform(3.6, 5.6)
    for centre, thick in strips:
        tall, tilt = max(8, int(thick * high)), int(rng.normal(0, 0.02) * view.width)
        threads = max(4, min(THREADS, round(tall / pitch))) * 8
        strip = _sized(_pick(rng, _textures().bands).crop((0, 0, 512, threads)), view.width, tall)
        size, shear = (view.width, tall + abs(tilt)), (1, 0, 0, tilt / view.width, 1, min(0, -tilt))
        strip = strip.transform(size, Image.Transform.AFFINE, shear, BILINEAR)
        top = int(view.top + high * (centre + rng.normal(0, 0.015)) - strip.height / 2)
        photo.paste(colour, (0, top), strip)


def expose(photo: Image.Image, rng: Generator) -> Image.Image:
    """Light and camera: the compartment's shade, vignetting, exposure, white balance, blur and noise."""
    textures = _textures()
    width, height = photo.size
    if rng.random() < 0.05:
        photo = photo.filter(ImageFilter.BoxBlur((rng.uniform(1.5, 5), rng.uniform(0, 0.6))))
    photo = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0.25, 0.6)))
    x, y = (int(rng.integers(0, TILE - side + 1)) for side in (width, height))
    across = np.linspace(-1, 1, width, dtype=np.float32)[None]
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = 1 - 0.16 * across**2 - 0.12 * down**2
    light -= rng.uniform(-0.12, 0.12) * across
    light *= 0.86 + 0.26 * textures.clouds[y : y + height, x : x + width]
    gain = rng.uniform(0.95, 1.4) * np.array([0.95, 0.9, 0.88], np.float32) * rng.normal(1, 0.012, 3)
    pixels = np.asarray(photo, np.float32) * 0.85 + 24
    pixels *= light[..., None] * gain.astype(np.float32)
    pixels += rng.uniform(1.2, 3.2) * textures.noise[y : y + height, x : x + width]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
