"""Finds the recorded cases and hands one to each test."""

import json
from pathlib import Path

import pytest

from tests.conftest import DEFAULT_PARITY, parity_folders
from tests.parity.case import STAGE_FILES, StageCase


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folders = parity_folders(metafunc.config)
    cases = [case for folder in folders for case in sorted(folder.iterdir()) if (case / "tokens.json").exists()]
    if "stage_case" in metafunc.fixturenames:
        stages = [StageCase(c, s) for c in cases for s in STAGE_FILES if (c / f"{s}.npz").exists()]
        names = [f"{stage.folder.name}-{stage.stage}" for stage in stages]
        _parametrize(metafunc, "stage_case", stages, names)
    if "entry" in metafunc.fixturenames:
        runs = [(case, entry) for case in cases for entry in entry_points(case)]
        _parametrize(metafunc, "case_folder,entry", runs, [f"{case.name}-{entry}" for case, entry in runs])
    elif "case_folder" in metafunc.fixturenames:
        _parametrize(metafunc, "case_folder", cases, [case.name for case in cases])
    if "parity_dir" in metafunc.fixturenames:
        _parametrize(metafunc, "parity_dir", folders, [f.name for f in folders])


def entry_points(case: Path) -> list[str]:
    """The ways of generating that a case has recorded."""
    return list(json.loads((case / "generation.json").read_text(encoding="utf-8")))


def _parametrize(metafunc: pytest.Metafunc, name: str, values: list, ids: list[str]) -> None:
    if not values:
        reason = f"no recorded cases in {', '.join(map(str, parity_folders(metafunc.config))) or DEFAULT_PARITY}"
        nothing = [None] * (name.count(",") + 1)
        metafunc.parametrize(name, [pytest.param(*nothing, marks=pytest.mark.skip(reason=reason))])
    else:
        metafunc.parametrize(name, values, ids=ids)


@pytest.fixture
def recorded(parity_dir: Path):
    """A file of the parity folder, or a skip where this folder has none."""

    def find(name: str) -> Path:
        path = parity_dir / name
        if not path.exists():
            pytest.skip(f"{parity_dir.name} holds no {name}")
        return path

    return find
