"""Runs of one shape are compiled once for all tests of this folder."""

import jax
import pytest

from tests.training.commands import Command


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    Command.end_all()
