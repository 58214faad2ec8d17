"""Which bins are looks at one bin: two thirds of the real ones are seen again with another count.

Two looks belong together when their records share at least half of their items, or when their photos are nearly
identical; a group is a connected component of that relation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

_HASH_BITS = 64
_BLOCK = 2048


def group_duplicates(
    ids: Sequence[str], items: Sequence[Sequence[str]], photo_hashes: npt.NDArray[np.uint64], distance: int
) -> list[str]:
    """The group of each bin, named after the first id in it.

    Args:
        ids: (n,) sorted ids.
        items: (n,) keys of the recorded items.
        photo_hashes: (n,) 64-bit perceptual hashes.
        distance: photos are nearly identical when their hashes differ in at most this many bits.
    """
    if not len(ids):
        return []
    links = sparse.csr_matrix(_shared_items(items) + _near_identical(photo_hashes, distance))
    _, component = connected_components(links, directed=False)
    first: dict[int, str] = {}
    for index, bin_id in zip(component, ids, strict=True):
        first.setdefault(int(index), bin_id)
    return [first[int(index)] for index in component]


def _shared_items(items: Sequence[Sequence[str]]) -> sparse.csr_matrix:
    """(n, n) links between records of which the larger shares at least half of its items with the other."""
    numbers: dict[tuple[str, ...], int] = {}  # a tuple is its own key: half a million sets would take 100 MB
    kind = np.array([numbers.setdefault(tuple(keys), len(numbers)) for keys in items])
    kinds = list(numbers)
    sizes = np.array([len(set(keys)) for keys in kinds], dtype=np.int32)
    codes: dict[str, int] = {}
    columns = [codes.setdefault(key, len(codes)) for keys in kinds for key in dict.fromkeys(keys)]
    rows = np.repeat(np.arange(len(kinds)), sizes)
    incidence = sparse.csr_matrix(
        (np.ones(len(columns), dtype=np.int32), (rows, columns)), shape=(len(kinds), max(1, len(codes)))
    )
    shared = sparse.triu(incidence @ incidence.T, k=1).tocoo()
    close = 2 * shared.data >= np.maximum(sizes[shared.row], sizes[shared.col])
    return _links(kind, shared.row[close], shared.col[close], alike=sizes[kind] > 0)


def _near_identical(hashes: npt.NDArray[np.uint64], distance: int) -> sparse.csr_matrix:
    """(n, n) links between hashes at most `distance` bits apart.

    Hashes that differ in at most d bits agree on one of d + 1 bands of their bits (pigeonhole), so only hashes with
    a band in common are compared: no all-pairs search.
    """
    distinct, kind = np.unique(hashes, return_inverse=True)
    found_rows, found_columns = [], []
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
                found_rows.append(part[row])
                found_columns.append(rest[column])
    rows = np.concatenate(found_rows) if found_rows else np.zeros(0, dtype=np.intp)
    columns = np.concatenate(found_columns) if found_columns else rows
    return _links(kind, rows, columns, alike=np.ones(len(hashes), dtype=bool))


def _links(
    kind: npt.NDArray[np.intp], rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], alike: npt.NDArray[np.bool_]
) -> sparse.csr_matrix:
    """(n, n) links between bins, from those between kinds of bins.

    Kinds are compared, not bins: a thousand bins with one placeholder for a photo are a thousand links, not a million.

    Args:
        kind: (n,) the kind of each bin.
        rows, columns: (m,) pairs of kinds that are close.
        alike: (n,) whether a bin belongs with others of its kind.
    """
    _, first = np.unique(kind, return_index=True)
    rows = np.concatenate([first[rows], np.flatnonzero(alike)])
    columns = np.concatenate([first[columns], first[kind[alike]]])
    return sparse.csr_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(kind),) * 2)
