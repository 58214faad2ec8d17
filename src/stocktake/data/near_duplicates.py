"""Which bins are snapshots of one bin.

Two snapshots belong together when their records share at least half of their items, or when their photos are nearly
identical; a group is a connected component of that relation.

An item that more than `common_item` bins record says nothing about which bin it is in: it counts when two records are
compared, but records that share only such items are not linked. Otherwise a few best-sellers would chain thousands of
bins into one group, and the number of pairs would grow with the square of an item's popularity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

_HASH_BITS = 64
_BLOCK = 2048
_LINKS = 1_000_000
"""Links held before they are merged into the groups."""

_Indices = npt.NDArray[np.intp]
_Links = tuple[_Indices, _Indices]


def group_duplicates(
    ids: Sequence[str],
    items: Sequence[Sequence[str]],
    photo_hashes: npt.NDArray[np.uint64],
    *,
    distance: int,
    common_item: int,
) -> list[str]:
    """The group of each bin, named after the first id in it.

    Args:
        ids: (n,) sorted ids.
        items: (n,) keys of the recorded items.
        photo_hashes: (n,) 64-bit perceptual hashes.
        distance: photos are nearly identical when their hashes differ in at most this many bits.
        common_item: an item in more bins than this links no two bins by itself.
    """
    if not len(ids):
        return []
    group = np.arange(len(ids))
    links = itertools.chain(_shared_items(items, common_item), _near_identical(photo_hashes, distance))
    for rows, columns in _batches(links):
        graph = sparse.coo_matrix(
            (np.ones(len(rows), dtype=bool), (group[rows], group[columns])), shape=(len(ids),) * 2
        )
        group = connected_components(graph, directed=False)[1][group]
    _, first, number = np.unique(group, return_index=True, return_inverse=True)
    return [ids[index] for index in first[number]]


def _batches(links: Iterable[_Links]) -> Iterator[_Links]:
    """The same links, in arrays of about a million."""
    pending: list[_Links] = []
    count = 0
    for rows, columns in links:
        pending.append((rows, columns))
        count += len(rows)
        if count >= _LINKS:
            yield _joined(pending)
            pending, count = [], 0
    if pending:
        yield _joined(pending)


def _joined(links: list[_Links]) -> _Links:
    return np.concatenate([rows for rows, _ in links]), np.concatenate([columns for _, columns in links])


def _shared_items(items: Sequence[Sequence[str]], common_item: int) -> Iterator[_Links]:
    """Links between records of which the larger shares at least half of its items with the other.

    Only pairs that share an item which is not common are compared, over all their items.
    """
    numbers: dict[tuple[str, ...], int] = {}  # a tuple is its own key: half a million sets would take 100 MB
    kind = np.array([numbers.setdefault(tuple(keys), len(numbers)) for keys in items])
    incidence = _incidence(list(numbers))
    bins_of_kind = np.bincount(kind)
    is_common = bins_of_kind @ incidence > common_item
    sizes = incidence.sum(axis=1)
    distinctive, common = incidence[:, ~is_common], incidence[:, is_common]
    first, links = _within_kinds(kind, alike=distinctive.sum(axis=1) > 0)
    yield links
    transposed = distinctive.T.tocsc()
    for begin in range(0, len(numbers), _BLOCK):
        shared = sparse.triu(distinctive[begin : begin + _BLOCK] @ transposed, k=begin + 1).tocoo()
        rows, columns, count = shared.row + begin, shared.col, shared.data
        for part in np.array_split(np.arange(len(count)), len(count) // _LINKS + 1):
            row, column = rows[part], columns[part]
            both = count[part] + common[row].multiply(common[column]).sum(axis=1)
            close = 2 * both >= np.maximum(sizes[row], sizes[column])
            yield first[row[close]], first[column[close]]


def _incidence(kinds: Sequence[Sequence[str]]) -> sparse.csr_array:
    """(kinds, items), 1 where a kind of record has the item."""
    codes: dict[str, int] = {}
    columns = [codes.setdefault(key, len(codes)) for keys in kinds for key in dict.fromkeys(keys)]
    rows = np.repeat(np.arange(len(kinds)), [len(set(keys)) for keys in kinds])
    ones = np.ones(len(columns), dtype=np.int32)
    return sparse.csr_array((ones, (rows, columns)), shape=(len(kinds), max(1, len(codes))))


def _near_identical(hashes: npt.NDArray[np.uint64], distance: int) -> Iterator[_Links]:
    """Links between photos whose hashes are at most `distance` bits apart.

    Hashes that differ in at most d bits agree on one of d + 1 bands of their bits (pigeonhole), so only hashes with
    a band in common are compared: no all-pairs search.
    """
    distinct, kind = np.unique(hashes, return_inverse=True)
    first, links = _within_kinds(kind, alike=np.ones(len(distinct), dtype=bool))
    yield links
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        band = (distinct >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, starts):
            for begin in range(0, len(bucket) if len(bucket) > 1 else 0, _BLOCK):
                part, rest = bucket[begin : begin + _BLOCK], bucket[begin:]
                near = np.bitwise_count(distinct[part, None] ^ distinct[None, rest]) <= distance
                row, column = np.nonzero(near)
                yield first[part[row]], first[rest[column]]


def _within_kinds(kind: _Indices, alike: npt.NDArray[np.bool_]) -> tuple[_Indices, _Links]:
    """The first bin of each kind, and links from it to the others of its kind.

    Kinds are compared, not bins: a thousand bins with one placeholder for a photo are a thousand links, not a million.

    Args:
        kind: (n,) the kind of each bin.
        alike: (kinds,) whether the bins of a kind belong together.
    """
    _, first = np.unique(kind, return_index=True)
    members = np.flatnonzero(alike[kind])
    return first, (members, first[kind[members]])
