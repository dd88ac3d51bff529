"""A launched file outside its environment says so in one line: to be imported by it before anything that is installed."""

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDED = ("numpy", "psutil", "yaml", "tqdm", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def problem() -> "str | None":
    """What this Python lacks, and the way on; None where it can run CareLM."""
    if sys.version_info < (3, 11):  # noqa: UP036  older ones read this too
        return f"{sys.executable} is Python {sys.version.split()[0]}, and CareLM needs 3.11 or newer"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    activate = os.path.join(ROOT, ".venv", "bin", "activate")
    way = "install CareLM: make install, then source .venv/bin/activate (or pip install -r requirements.txt)"
    if os.path.dirname(sys.executable) == os.path.dirname(activate):
        way = f"its environment is not whole: pip install -r {os.path.relpath(os.path.join(ROOT, 'requirements.txt'))}"
    elif os.path.exists(activate):
        way = f"activate its environment: source {os.path.relpath(activate)}"
    return f"{sys.executable} has no {', '.join(missing)}; {way}"


if found := problem():
    if os.environ.get("RANK", "0") in ("", "0"):
        sys.stderr.write(f"error: {found}\n")
    sys.exit(2)
