"""What made a result: the versions of the packages, and the commit of this code."""

import importlib.metadata
import shutil
import subprocess

from carelm.files import PROJECT, ROOT

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets")


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of this code, with a + where the working tree differs from it; None outside a git checkout and its copies,
    and where git is not installed."""
    if (ROOT / "COMMIT").is_file():  # a SLURM job's copy
        return (ROOT / "COMMIT").read_text().strip() or None
    if PROJECT is None or not (PROJECT / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(PROJECT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode != 0:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return commit.stdout.strip() + ("+" if changed else "")
