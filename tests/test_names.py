"""Scripts run with their own folder first on sys.path: no file there may hide a library or a standard module."""

import importlib.metadata
import sys

from launching import PROJECT


def test_no_launched_file_hides_a_module():
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    launched = [p for folder in ("train", "eval", "serve", "benchmarks") for p in (PROJECT / folder).glob("*.py")]
    assert launched and not [p.name for p in launched if p.stem in taken]
