"""A missing package is named with what brings it; a broken one is not called missing."""

import sys

import pytest

from clara_jax.errors import UserError, require_package


def test_a_missing_package_is_named_with_what_brings_it():
    with pytest.raises(UserError, match=r"^a map needs the package no-such-package,.*install 'clara_jax\[maps\]'"):
        require_package("no_such_package", "a map", "clara_jax[maps]")


def test_a_package_that_lacks_another_is_not_called_missing(tmp_path, monkeypatch):
    """Told to install what is installed, a user would look in the wrong place."""
    (tmp_path / "broken_package.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_package", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require_package("broken_package", "a map", "clara_jax[maps]")
