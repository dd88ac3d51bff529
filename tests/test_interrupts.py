"""Ctrl-C is one line from a launched file's first moment on."""

import os
import subprocess
import sys

import pytest
from launching import PROJECT

# Sends Ctrl-C in the midst of the imports at the head of each launched file.
WHILE_IMPORTING = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == "carelm.recipe_file":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
"""


@pytest.mark.parametrize("file", ["train/sft.py", "eval/run.py", "train/merge.py", "train/chat.py", "train/sweep.py"])
def test_ctrl_c_while_it_imports_is_one_line(tmp_path, file):
    (tmp_path / "sitecustomize.py").write_text(WHILE_IMPORTING)
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    done = subprocess.run([sys.executable, file, "--help"], cwd=PROJECT, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: interrupted; the same command goes on with what is saved, or begins again\n"
