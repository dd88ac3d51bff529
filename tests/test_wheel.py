"""The package as a wheel: whole, and at home where no checkout is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PROJECT

MAKE_A_REPORT = """
from pathlib import Path
from carelm.evaluation import report, results
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe

recipe = load_recipe(["--config", "shop.yaml"], usage="")
questions = [Question(id=f"q{i}", conversation=f"c{i}", category="lamps", references=[f"Lamp {i} is in aisle {i}."],
                      messages=[dict(role="user", content=f"Where is lamp {i}?")]) for i in range(12)]
times = dict(p50=9.0, p95=11.0, p99=12.0)
measured = dict(kind="base", folder=".", precision="fp32", bits=None, load_seconds=1.0, total_parameters=10,
                trained_parameters=None, unused_generation_config={},
                peak_memory_bytes=2**30, prompt_tokens=dict(p50=7, p95=8, max=9), generation_config={}, conditions={},
                throughput=dict(examples=12, of_examples=12, examples_per_second=3.0, tokens_per_second=9.0, batch_size=4),
                latency=dict(prompts=12, ttft_ms=times, tpot_ms=times, e2e_ms=times))
lines = {name: [dict(prediction=text.format(i), finish_reason="stop", new_tokens=6) for i in range(12)]
         for name, text in (("base", "Lamp"), ("tuned", "Lamp {} is here."))}
found = results.make_results(recipe, questions, lines, dict(base=measured, tuned=measured))
found |= dict(test=dict(questions=12, conversations=12, split="test", dataset="rows"), conditions=dict(num_resamples=9))
report.write(Path("."), recipe, found, questions, lines)
print(report.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but the package in it, as pip installs its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PROJECT / "carelm", folder / "source/carelm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for words in (
        "wheel --no-deps --no-build-isolation --no-index --wheel-dir . ./source",
        "install --no-deps --no-index --find-links . --target site carelm",
    ):
        done = subprocess.run([*pip, *words.split()], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "site"


def run(installed: Path, folder: Path, *words) -> subprocess.CompletedProcess:
    """Python in `folder`, with the installed package and no checkout on its path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_it_holds_every_file_of_the_package_and_nothing_else(installed):
    here, there = (
        {str(p.relative_to(root)) for p in (root / "carelm").rglob("*") if p.is_file() and p.suffix != ".pyc"}
        for root in (PROJECT, installed)
    )
    assert there == here and {p.name.partition("-")[0] for p in installed.iterdir()} == {"carelm"}


def test_the_launched_files_show_their_keys_with_it(installed, tmp_path):
    for file in ("train/sft.py", "train/merge.py", "eval/run.py"):
        shown = run(installed, tmp_path, shutil.copy(PROJECT / file, tmp_path), "--help")
        assert shown.returncode == 0 and "--output_dir" in shown.stdout, shown.stderr


def test_it_makes_a_report(installed, tmp_path):
    (tmp_path / "shop.yaml").write_text("dataset_name: rows.csv\nprompt_template: '{q}'\ncompletion_template: '{a}'\n")
    done = run(installed, tmp_path, "-P", "-c", MAKE_A_REPORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed / "carelm/evaluation/report.py")
    assert "<svg" in (tmp_path / "report.html").read_text() and "## Scores" in (tmp_path / "report.md").read_text()
    assert set(json.loads((tmp_path / "results.json").read_text())["models"]) == {"base", "tuned"}


def test_what_lies_beside_an_installed_package_is_no_data_and_no_recipe_of_the_user(installed, tmp_path):
    """Other packages lie there, `evaluate` and `datasets` among them, which are also names on the Hub."""
    (installed / "shop").mkdir()
    code = (
        "from carelm import files, provenance; from carelm.data.sources import is_hub_id; "
        "print(files.locate('shop'), is_hub_id('shop'), provenance.git_commit(), files.code_fingerprint('carelm', 'train'))"
    )
    shown = run(installed, tmp_path, "-P", "-c", code).stdout.split()
    assert shown[:3] == ["shop", "True", "None"] and len(shown[3]) == 16
    missing = run(installed, tmp_path, shutil.copy(PROJECT / "train/sft.py", tmp_path))
    assert missing.returncode == 2 and "recipe recipes/demo.yaml cannot be read" in missing.stderr
