"""What stands in two files is the same in both, and every path that a text names is there."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("lit_jax", "configs", "tests", "docs", "launch", "examples")


def requirements(name: str) -> set[str]:
    """The packages that a requirements file names, those of the files that it includes too."""
    found = set()
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= requirements(line[3:])
        elif line:
            found.add(line)
    return found


def test_the_dev_extra_is_requirements_dev():
    extra = set(PROJECT["optional-dependencies"]["dev"])
    assert extra == requirements("requirements-dev.txt") - requirements("requirements.txt")


def test_the_version_is_the_same_everywhere():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changelog = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation[1] == changelog[1] == PROJECT["version"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_every_path_that_a_text_names_exists(text):
    """Placeholders in capitals, `configs/NAME.py`, stand for any file."""
    pattern = rf"\b((?:{'|'.join(FOLDERS)})/[\w/.-]+\.\w+)"
    for path in re.findall(pattern, text.read_text()):
        if "NAME" not in path:
            assert (ROOT / path).exists() or (text.parent / path).exists(), path
