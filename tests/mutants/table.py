"""All mutants."""

from __future__ import annotations

from mutants.leaks import MUTANTS as LEAKS
from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*LEAKS,)
