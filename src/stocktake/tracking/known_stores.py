"""The tracking addresses that a workspace's own runs were started with.

A run folder from elsewhere names an address too, and `sync` would send credentials there. So it uses an address only
if it is given or in this list. A line holds the inode of the folder of runs, which a list copied from elsewhere lacks.
"""

from __future__ import annotations

from pathlib import Path

FILE = ".stores"


def known_stores(runs: Path) -> set[str]:
    """Tracking URIs, without credentials."""
    path = runs / FILE
    if path.is_symlink() or not path.is_file():
        return set()
    inode = str(runs.stat().st_ino)
    lines = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
    return {uri for owner, _, uri in lines if owner == inode}


def add_known_store(runs: Path, uri: str) -> None:
    """Add a tracking URI, which comes without credentials."""
    if uri not in known_stores(runs):
        with (runs / FILE).open("a", encoding="utf-8") as file:
            file.write(f"{runs.stat().st_ino} {uri}\n")
