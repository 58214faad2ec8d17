"""The table of mutants fits the source; `tests/mutants/run.py` runs it."""

from __future__ import annotations

from pathlib import Path

from mutants.table import MUTANTS

ROOT = Path(__file__).parents[1]


def test_each_mutant_has_one_place_in_the_source_and_a_test_file() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        occurrences = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        assert (mutant.name, occurrences) == (mutant.name, 1)
        assert mutant.old != mutant.new
        assert mutant.tests
        for test in mutant.tests:
            path, _, function = test.partition("::")
            assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), f"{mutant.name}: {test}"
