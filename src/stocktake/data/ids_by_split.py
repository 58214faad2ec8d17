"""Which bin is in which split, as a Parquet file: what a workspace remembers of a root, and what a run logs.

A file that is damaged is never taken for one that says nothing: the splits would be drawn anew.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from stocktake.data.sources import ID
from stocktake.data.splits import SPLITS
from stocktake.errors import StocktakeError
from stocktake.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

    from stocktake.config.data import SplitConfig

FILE = "splits.parquet"
"""Of a run's artifacts: id, group, split and phash of each bin of its manifest."""
RUN_COLUMNS = ["id", "group", "split", "phash"]


def write_ids_by_split(path: Path, table: pd.DataFrame) -> None:
    """Write id, split and whatever other columns there are, with checksums."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)


def read_ids_by_split(path: Path) -> pd.DataFrame:
    """The table, with at least the columns id and split.

    Raises:
        ValueError: it cannot be read, or is no such table; the message is the reason.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: pd.DataFrame = pq.read_table(path, page_checksum_verification=True).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:200]) from None
    if missing := {"id", "split"} - set(table.columns):
        raise ValueError(f"it lacks the column {min(missing)}")
    for name, pattern in {"id": ID, "split": re.compile("|".join(SPLITS))}.items():
        strange = [value for value in table[name].unique() if not (isinstance(value, str) and pattern.fullmatch(value))]
        if strange:
            raise ValueError(f"it holds {strange[0]!r}, which is no {name}")
    if table["id"].duplicated().any():
        raise ValueError("it holds a bin twice")
    return table


class SplitMemory:
    """The splits that bins of one root have been given by settings that draw alike: by, fractions, seed and like."""

    def __init__(self, folder: Path, config: SplitConfig) -> None:
        """Read what is remembered.

        Args:
            folder: of the root's manifest; the caller holds its lock.
            config: whose splits.

        Raises:
            StocktakeError: the memory or the file of --split.like is damaged.
        """
        import pandas as pd

        like = _read_like(Path(config.like)) if config.like else None
        settings = (config.by, *map(float, config.fractions), config.seed, _digest(like))
        key = hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()
        self.path = folder / f"splits-{key}.parquet"
        self._known = self._read() if self.path.exists() else pd.DataFrame(columns=["id", "split"], dtype="str")
        self.splits = self._known
        """id and split."""
        if like is not None:
            self.splits = pd.concat([self._known, like]).drop_duplicates("id", ignore_index=True)

    def _read(self) -> pd.DataFrame:
        try:
            return read_ids_by_split(self.path)[["id", "split"]]
        except ValueError as error:
            raise StocktakeError(
                f"{self.path}, which remembers the splits of the root, is damaged ({error}): copy the {FILE} of a "
                "run of this root over it, give --split.like RUN, or delete it to draw all splits anew"
            ) from None

    def remember(self, bins: pd.DataFrame) -> None:
        """Keep the bins' splits (id, split), and those of bins that are not among them."""
        import pandas as pd

        table = pd.concat([bins[["id", "split"]], self.splits]).drop_duplicates("id")
        table = table.sort_values("id", ignore_index=True)
        if _digest(table) != _digest(self._known):
            write_ids_by_split(self.path, table)


def _read_like(path: Path) -> pd.DataFrame:
    file = path / "artifacts" / FILE if path.is_dir() else path
    try:
        return read_ids_by_split(file)[["id", "split"]]
    except ValueError as error:
        raise StocktakeError(
            f"--split.like {path}: {file} is no table of ids by split ({error}): give a run, or a Parquet file with "
            "the columns id and split"
        ) from None


def _digest(table: pd.DataFrame | None) -> str:
    if table is None:
        return ""
    lines = sorted(f"{bin_id} {split}\n" for bin_id, split in zip(table["id"], table["split"], strict=True))
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()
