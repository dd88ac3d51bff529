"""Scripts run with their own folder first on sys.path: no file there may hide a library or a standard module."""

import importlib.metadata
import sys

from launching import PROJECT


def test_no_launched_file_hides_a_module():
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    launched = [p for folder in ("train", "eval", "serve", "benchmarks") for p in (PROJECT / folder).glob("*.py")]
    assert launched and not [p.name for p in launched if p.stem in taken]


def test_no_two_files_that_tests_import_by_name_are_called_alike():
    files = [
        p for folder in ("tests", "benchmarks") for p in (PROJECT / folder).rglob("*.py") if p.name != "conftest.py"
    ]
    names = [p.name for p in files]
    assert len(names) > 50 and not [name for name in {*names} if names.count(name) > 1]
