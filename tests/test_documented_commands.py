"""The training commands that README and docs give are ones that the program takes."""

import re
import subprocess

import pytest

from clara_jax.curriculum import parse_curriculum
from tests.conftest import ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "docs/paper.md", "docs/training.md")]
# In the shell that unfolds a document's loops nothing can be run, and `python` prints, at once, what it was given.
UNFOLD = r"""python() { local all; printf -v all '%s\x1f' "$@"; printf '%s\x1e' "$all"; }
"""


def python_commands(document, folder) -> list[list[str]]:
    """The arguments of every `python` in the document's shell blocks, in the order in which they would be run."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    script = UNFOLD + "".join(blocks)
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd=folder, env={"PATH": ""}, capture_output=True, text=True, check=False
    )
    return [command.split("\x1f")[:-1] for command in done.stdout.split("\x1e")[:-1]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_every_training_command_is_taken(document, tmp_path, monkeypatch):
    """A key that was renamed would stop a reader of the old name, on a pod perhaps after an hour's wait."""
    monkeypatch.chdir(ROOT)
    found = python_commands(document, tmp_path)
    of_training = [arguments for _, module, *arguments in found if module == "clara_jax.train"]
    assert of_training
    for arguments in of_training:
        assert parse_curriculum(arguments).runs


def test_the_commands_of_the_papers_tables_are_found(tmp_path):
    """Without this, a document whose blocks were not unfolded would pass."""
    commands = python_commands(ROOT / "docs" / "paper.md", tmp_path)
    of_training = [command for command in commands if command[1] == "clara_jax.train"]
    assert len(of_training) == 6 * 2 + 1 + 2  # Table 1: six rates of two stages; Table 2; Table 7
    assert "--model.start_from=runs/rate_256/compression_pretraining" in of_training[11]
