"""A bucket's listing: remembered in parts, and gone on with where somebody stopped reading."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stocktake.data.listing import Listing, numbers
from stocktake.data.s3_source import Listed
from stocktake.data.source import PHOTOS


class _Pages:
    """A bucket of so many photos that counts the pages it gives."""

    def __init__(self, count: int, page: int) -> None:
        self.keys = sorted([*(f"bin-images/{n:06d}.jpg" for n in range(count)), "bin-images/", "bin-images/a/b.jpg"])
        self.page = page
        self.pages = 0

    def list(self, prefix: str, after: str = "") -> Iterator[list[Listed]]:
        keys = [key for key in self.keys if key > after]
        for begin in range(0, len(keys), self.page):
            self.pages += 1
            yield [Listed(key, len(key)) for key in keys[begin : begin + self.page]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 60), page=st.integers(1, 17), part=st.integers(1, 40), stops=st.lists(st.integers(0, 40)))
def test_a_listing_goes_on_where_it_was_left(
    count: int,
    page: int,
    part: int,
    stops: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    bucket: Any = _Pages(count, page)
    folder = tmp_path_factory.mktemp("listing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stocktake.data.listing._PART", part)
        expected = [f"{number:06d}" for number in range(count)]
        for stop in stops:
            read = iter(Listing(lambda: bucket, PHOTOS, folder))
            assert [bin_id for bin_id, _ in islice(read, stop)] == expected[:stop]
            read.close()  # type: ignore[attr-defined]
        listing = Listing(lambda: bucket, PHOTOS, folder)
        assert [bin_id for bin_id, _ in listing] == expected
        assert listing.is_complete
        pages = bucket.pages
        assert numbers(listing) == (count, count * len("bin-images/000000.jpg"))
        assert bucket.pages == pages  # remembered
