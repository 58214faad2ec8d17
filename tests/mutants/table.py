"""All mutants."""

from __future__ import annotations

from mutants.faults import MUTANTS as FAULTS
from mutants.faults_aws import MUTANTS as FAULTS_AWS
from mutants.faults_security import MUTANTS as FAULTS_SECURITY
from mutants.leaks import MUTANTS as LEAKS
from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*LEAKS, *FAULTS, *FAULTS_AWS, *FAULTS_SECURITY)
