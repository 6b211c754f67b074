"""The list of modules in docs/architecture.md is complete, and imports point down it."""

import ast
import itertools
import re
from pathlib import Path

from tests.conftest import ROOT


def listed() -> list[str]:
    """Each row's files and folders, braces unfolded: `rows[n]` are the paths of row n, space-separated."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `clara_jax/")]
    return [" ".join(itertools.chain(*map(_unfolded, re.findall(r"`([^`]+)`", cell)))) for cell in cells]


def _unfolded(path: str) -> list[str]:
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [f"{found[1]}{name}{found[3]}" for name in found[2].split(",")] if found else [path]


def row_of(path: Path, rows: list[str]) -> int:
    """The row that names the file, else the one that names its folder."""
    relative = path.relative_to(ROOT)
    for wanted in (str(relative), f"{relative.parent}/"):
        for number, row in enumerate(rows):
            if wanted in row.split():
                return number
    raise AssertionError(f"{relative} is not in the list of docs/architecture.md")


def imported(path: Path) -> set[Path]:
    """Files of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clara_jax":
            place = ROOT.joinpath(*node.module.split("."))
            found |= {place / f"{alias.name}.py" for alias in node.names} | {place.with_suffix(".py")}
        elif isinstance(node, ast.Import):
            found |= {ROOT.joinpath(*alias.name.split(".")).with_suffix(".py") for alias in node.names}
    return {file for file in found if file.exists()}


def test_every_listed_path_exists():
    """A reader who follows the list must find what it names."""
    missing = [path for row in listed() for path in row.split() if not (ROOT / path).exists()]
    assert not missing


def test_imports_point_down_the_list():
    """An import upwards would tie what is below to what is above, and soon in a circle."""
    rows = listed()
    upwards = []
    for path in sorted((ROOT / "clara_jax").rglob("*.py")):
        if path.name == "__init__.py" and path.parent.name != "clara_jax":
            continue
        upwards += [
            f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
            for other in sorted(imported(path))
            if row_of(other, rows) < row_of(path, rows)
        ]
    assert not upwards
