"""Put each mutant into a copy of the tree and run its tests: `python tests/mutants/run.py [NAME ...]`.

Prints a line for each mutant with the test that noticed it. Exits with 1 if a mutant survives, or if its tests fail
without it. Not part of `make test`: it takes minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mutants.mutant import Mutant  # noqa: E402
from mutants.table import MUTANTS  # noqa: E402


def copy_tree(destination: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, destination / name)


def failing_tests(tree: Path, tests: Iterable[str]) -> list[str]:
    """Run tests in a copy of the tree; return those that failed.

    Raises:
        RuntimeError: pytest could not run them.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=0", *tests]
    # without cached bytecode: a file that changes twice within a second is read anew
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-1000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)


def run_mutant(mutant: Mutant, tree: Path) -> list[str]:
    """Return the tests that fail with the mutant in the tree."""
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        raise RuntimeError(f"{mutant.name}: its text occurs {original.count(mutant.old)} times in {mutant.file}")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return failing_tests(tree, mutant.tests)
    finally:
        path.write_text(original, encoding="utf-8")


def main(names: list[str]) -> int:
    """Run the named mutants, or all."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        print(f"no mutant {', '.join(sorted(unknown))}; there are:", *(mutant.name for mutant in MUTANTS), sep="\n  ")
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        tree = Path(temporary)
        copy_tree(tree)
        tests = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        if broken := failing_tests(tree, tests):
            print(f"fails without any mutant: {', '.join(broken)}")
            return 1
        for mutant in chosen:
            failing = run_mutant(mutant, tree)
            survivors += not failing
            print(f"{mutant.name}: {', '.join(failing) if failing else 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
