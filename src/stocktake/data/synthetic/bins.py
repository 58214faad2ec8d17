"""What the bins of a synthetic root hold, one id after the other: articles, records, and where every item stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from numpy.random import Generator, SeedSequence, default_rng

from stocktake.config.data import SyntheticConfig
from stocktake.data.synthetic.rendering import Compartment, Pose, Product

# How many of the public dataset's 8,710 bins have this quantity.
QUANTITIES = (165, 827, 1679, 2029, 1781, 1329, 236, 177, 124, 88, 55, 56, 38, 21, 25, 14)
# The change of quantity between two snapshots of one bin, in percent of the public dataset's neighbouring pairs.
EVENTS = {-1: 52, 1: 28, 2: 8, -2: 6, -3: 3, 3: 3}
ASPECTS = (1.68, 1.46, 1.35, 1.3, 1.12, 1.05, 0.78, 0.73, 0.6)

BRANDS = ("Norvale", "Brightwell", "Kestrel", "Lumo", "Harrow", "Tansy", "Orbita", "Fennick", "Quillo", "Zephra")
QUALITIES = ("Deluxe", "Classic", "Travel Size", "Organic", "Heavy Duty", "Kids", "Professional", "Mini", "Refill")
NOUNS = {
    "box": ("Puzzle Game", "LED Lamp", "Tea Sampler", "Phone Case", "Desk Clock", "Building Set"),
    "carton": ("Storage Rack", "Coffee Mug Set", "Water Filter", "Shower Head", "Wall Mount"),
    "book": ("Field Guide", "Cookbook", "Novel [Hardcover]", "Workbook", "Blu-ray", "Sketchbook"),
    "bottle": ("Shampoo, 12 oz", "Vitamin C, 90 Capsules", "Hot Sauce", "Body Lotion", "Fish Oil, 120 Softgels"),
    "bag": ("T-Shirt, Large", "Trail Mix, 2 lb", "Plush Bear", "Socks, 6 Pairs", "USB Cable, 6 ft", "Dog Treats"),
}
# Sides of the front and the depth, relative to one another: the middles of log-normal spreads.
SHAPES = {
    "box": (1.0, 1.15, 0.6),
    "carton": (1.15, 0.9, 0.9),
    "book": (0.42, 1.6, 1.1),
    "bottle": (0.62, 1.35, 0.62),
    "bag": (1.1, 1.05, 0.35),
}


@dataclass(frozen=True)
class _Article:
    """A product and what a record says of it."""

    product: Product
    name: str | None
    normalized: bool
    weight: float | None
    measured: bool


@dataclass
class _Bin:
    """A bin as it stands between two events."""

    compartment: Compartment
    scale: float  # sqrt of the middle item's front, inches
    items: list[tuple[_Article, int]] = field(default_factory=list)

    def stow(self, rng: Generator) -> None:
        """Another item of an article that is here already, or a new article."""
        if self.items and rng.random() < 0.42:
            article = self.items[int(rng.integers(len(self.items)))][0]
        else:
            article = _article(rng, self.scale, self.compartment)
        self.items.append((article, int(rng.integers(2**31))))

    def pick(self, rng: Generator) -> None:
        self.items.pop(int(rng.integers(len(self.items))))


@dataclass(frozen=True)
class Plan:
    """One id: its record, and its photo to be: the items of the compartment, the farthest first."""

    name: str
    record: dict[str, Any]
    compartment: Compartment
    poses: tuple[Pose, ...]
    size: int
    seed: tuple[int, ...]


def plans(config: SyntheticConfig) -> Iterator[Plan]:
    """Every id in order, without end. Half of the bins are seen more than once, at neighbouring ids."""
    index = 1
    chain = 0
    while True:
        rng = default_rng(SeedSequence((config.seed, 0, chain)))
        chain += 1
        snapshots = int(rng.choice([2, 2, 2, 3, 3, 4])) if rng.random() < 0.28 else 1
        quantity = _draw(rng, QUANTITIES)
        bin_ = _empty_bin(rng, quantity)
        for _ in range(quantity):
            bin_.stow(rng)
        for snapshot in range(snapshots):
            if snapshot:
                _event(bin_, rng)
            seed = (config.seed, 1, index)
            record = _record(bin_, default_rng(SeedSequence(seed)))
            yield Plan(f"{index:05d}", record, bin_.compartment, _arrange(bin_), config.size, seed)
            index += 1


def _draw(rng: Generator, weights: tuple[float, ...]) -> int:
    point = rng.random() * sum(weights)
    for k, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return k
    return len(weights) - 1


def _empty_bin(rng: Generator, quantity: int) -> _Bin:
    aspect = ASPECTS[int(rng.integers(len(ASPECTS)))] * rng.uniform(0.96, 1.04)
    area = rng.uniform(80, 190)
    room = Compartment(
        math.sqrt(area * aspect), math.sqrt(area / aspect), bool(rng.random() < 0.5), int(rng.integers(2**31))
    )
    # How full the bin looks says something of how many items are in it, not much: where many are, they are smaller.
    share = rng.uniform(0.07, 0.2) * (3 / max(quantity, 1)) ** 0.3
    return _Bin(room, math.sqrt(share * area))


def _event(bin_: _Bin, rng: Generator) -> None:
    """Picks or stows; the more common the new quantity, the more likely, so that chains do not run dry."""
    now = len(bin_.items)
    changes = [c for c in EVENTS if abs(c) <= max(1, now / 2) and now + c in range(len(QUANTITIES))]
    weights = tuple(EVENTS[c] * math.sqrt(QUANTITIES[now + c]) for c in changes)
    change = changes[_draw(rng, weights)]
    for _ in range(abs(change)):
        if change > 0:
            bin_.stow(rng)
        else:
            bin_.pick(rng)


def _article(rng: Generator, scale: float, room: Compartment) -> _Article:
    kind = tuple(SHAPES)[_draw(rng, (30, 12, 22, 16, 20))]
    width, height, depth = (side * scale * math.exp(rng.normal(0, 0.22)) for side in SHAPES[kind])
    if kind != "bottle" and rng.random() < 0.35:
        width, height = height, width
    shrink = min(1.0, 0.85 * room.width / width, 0.9 * room.height / height)
    letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    asin = "B0" + "".join(letters[k] for k in rng.integers(0, 36, 8))
    brand, quality, noun = (words[int(rng.integers(len(words)))] for words in (BRANDS, QUALITIES, NOUNS[kind]))
    seed = int(rng.integers(2**31))
    product = Product(asin, kind, width * shrink, height * shrink, depth * shrink, seed)
    gaps = rng.random(4)
    return _Article(
        product,
        name=None if gaps[0] < 0.00015 else f"{brand} {quality} {noun}",
        normalized=bool(gaps[1] > 0.004),
        weight=None
        if gaps[2] < 0.021
        else round(0.012 * width * height * depth * math.exp(rng.normal(0, 0.6)), 2) + 0.02,
        measured=bool(gaps[3] > 0.002),
    )


def _arrange(bin_: _Bin) -> tuple[Pose, ...]:
    """Where every item stands, the farthest first: rows of columns, some of them stacks, some items leaning.

    An item's pose comes from its own seed and its neighbours: take one out and the others move up a little.
    """
    room = bin_.compartment
    rng = default_rng(SeedSequence((room.seed, 1)))
    stacking, back_share, spread = rng.choice([0.3, 0.7]), rng.choice([0.0, 0.25, 0.4]), rng.uniform(0.2, 1)
    items = [(article.product, seed) for article, seed in bin_.items]
    quirks = {seed: default_rng(seed).random(8) for _, seed in items}
    tall_first = sorted(items, key=lambda item: -item[0].height)
    behind = {seed for _, seed in tall_first[: round(back_share * len(tall_first))]}
    poses: list[Pose] = []
    for back in (0.8, 0.12):
        columns: list[list[tuple[Product, int]]] = []
        for item in (item for item in items if (item[1] in behind) == (back > 0.5)):
            product, seed = item
            taken = sum(max(p.width for p, _ in column) for column in columns)
            crowded = taken + product.width > 1.1 * room.width
            below = min(columns, key=_tall, default=[]) if crowded else columns[-1] if columns else []
            steady = below and "bottle" not in (product.kind, below[-1][0].kind)
            fits = _tall(below) + product.height < 0.92 * room.height
            if steady and fits and (crowded or quirks[seed][0] < stacking):
                below.append(item)
            else:
                columns.append([item])
        widths = [max(p.width for p, _ in column) for column in columns]
        free = room.width * 0.95 - sum(widths)
        gaps = [quirks[column[0][1]][1] + 0.02 for column in columns]
        left = free * (1 - spread) * rng.random() if free > 0 else 0.0
        for column, wide, gap in zip(columns, widths, gaps, strict=True):
            lift = 0.0
            if free > 0:
                left += free * spread * gap / (sum(gaps) + 0.5)
            for product, seed in column:
                quirk = quirks[seed]
                lean = (quirk[2] - 0.5) * 8 + (quirk[3] < 0.2) * (quirk[4] - 0.5) * 50
                slack = (wide - product.width) * quirk[5]
                flipped = bool(product.kind != "bottle" and quirk[6] < 0.15)
                poses.append(Pose(product, left + slack, lift, back + 0.12 * (quirk[7] - 0.5), lean, flipped))
                lift += product.height * 0.97
            left += wide + (free / max(1, len(columns) - 1) if free < 0 else 0.0)
    return tuple(sorted(poses, key=lambda pose: (-round(pose.back, 1), pose.lift)))


def _tall(column: list[tuple[Product, int]]) -> float:
    return sum(product.height for product, _ in column)


def _record(bin_: _Bin, rng: Generator) -> dict[str, Any]:
    """The inventory's record, with the public dataset's fields and, as rarely as there, its gaps."""
    entries: dict[str, dict[str, Any]] = {}
    for article, _ in bin_.items:
        product = article.product
        if product.asin in entries:
            entries[product.asin]["quantity"] += 1
            continue
        sides = {"height": product.height, "length": product.depth, "width": product.width}
        inches = {k: {"unit": "IN", "value": round(v, 2)} if article.measured else None for k, v in sides.items()}
        entry = {
            "asin": product.asin,
            "height": inches["height"],
            "length": inches["length"],
            "name": article.name,
            "normalizedName": article.name,
            "quantity": 1,
            "weight": article.weight and {"unit": "pounds", "value": round(article.weight, 2)},
            "width": inches["width"],
        }
        if not article.normalized:
            del entry["normalizedName"]
        entries[product.asin] = entry
    wrong = rng.random() < 0.0006
    if wrong and entries:
        next(iter(entries.values()))["quantity"] += 1
    return {"BIN_FCSKU_DATA": entries, "EXPECTED_QUANTITY": len(bin_.items)}
