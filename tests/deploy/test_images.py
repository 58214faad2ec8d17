"""What the images are built from: the build context by docker's own matcher, pinned bases, locks for one purpose."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

REPOSITORY = Path(__file__).parents[2]
IMAGES = REPOSITORY / "deploy" / "images"
NAMES = ("serving", "training")
INSTALLED_WITH = {"serving": ("serving",), "training": ("training", "serving", "aws", "managed-mlflow")}
DEVELOPERS_TOOLS = {
    "hypothesis",
    "moto",
    "mypy",
    "playwright",
    "pyspark",
    "pytest",
    "ruff",
    "sagemaker",
    "schemathesis",
}


def dockerfile(name: str) -> str:
    return (IMAGES / name / "Dockerfile").read_text()


def copied(name: str) -> set[str]:
    """The sources of the Dockerfile's COPY lines that come from the build context."""
    lines = re.findall(r"^COPY (?!.*--from)((?:--\S+ )*)(.+) \S+$", dockerfile(name), re.MULTILINE)
    return {source for _, sources in lines for source in sources.split()}


@pytest.mark.parametrize("name", NAMES)
def test_the_context_holds_what_is_copied_and_nothing_else(name: str) -> None:
    ignored = (IMAGES / name / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line.strip() and not line.startswith("#")]
    context = {path for path in exclude_paths(str(REPOSITORY), patterns) if (REPOSITORY / path).is_file()}
    assert copied(name)
    needed: set[str] = set()
    for source in copied(name):
        tracked = subprocess.run(
            ["git", "ls-files", source], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert tracked.stdout, f"{source} is not in the repository"
        needed |= set(tracked.stdout.splitlines())
    assert needed <= context
    assert not [path for path in context if not path.startswith(tuple(copied(name))) or "__pycache__" in path]


@pytest.mark.parametrize("name", NAMES)
def test_bases_have_a_digest_and_packages_have_hashes(name: str) -> None:
    bases = re.findall(r"^FROM (\S+)", dockerfile(name), re.MULTILINE)
    assert bases
    assert all(base.endswith("@${DIGEST}") for base in bases)
    assert re.search(r"^ARG DIGEST$", dockerfile(name), re.MULTILINE), "no default: the build fails without it"
    for install in re.findall(r"pip (?:install|wheel) [^&\n]*", dockerfile(name)):
        assert "--require-hashes" in install or "--no-deps" in install, install
    assert "pip wheel" not in dockerfile(name) or "--no-build-isolation" in dockerfile(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_holds_its_extras_and_no_developers_tools(name: str) -> None:
    image, project = pins(IMAGES / name / "requirements.lock"), pins(REPOSITORY / "requirements.lock")
    assert image.items() <= project.items()
    assert not image.keys() & DEVELOPERS_TOOLS
    described = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [described["optional-dependencies"][extra] for extra in INSTALLED_WITH[name]]
    for requirement in [*described["dependencies"], *(line for extra in extras for line in extra)]:
        assert re.split(r"[^\w.-]", requirement.lower())[0] in image


def test_photos_are_decoded_by_pillow_13_or_later() -> None:
    """Earlier ones have known faults that a photo can use."""
    for lock in (REPOSITORY / "requirements.lock", *IMAGES.glob("*/requirements.lock")):
        assert int(pins(lock)["pillow"].split(".")[0]) >= 13
    described = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "pillow>=13" in described["dependencies"]


def test_what_builds_the_project_is_pinned_with_hashes() -> None:
    lock = REPOSITORY / "requirements-build.lock"
    assert {"uv", "hatchling"} <= pins(lock).keys()
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", lock.read_text().strip()))
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all("--require-hashes" in line for line in re.findall(r".*pip install .*uv|.*pip sync.*", makefile))
    assert "--no-build-isolation" in makefile


def pins(lock: Path) -> dict[str, str]:
    """Package -> version."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+!]+)", lock.read_text(), re.MULTILINE))
