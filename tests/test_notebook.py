"""notebooks/first_hour.ipynb runs from its first cell to its last on the demo's base."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import PROJECT
from launching import environment
from nbclient import NotebookClient

NOTEBOOK = PROJECT / "notebooks/first_hour.ipynb"
SMALLER = {  # so that it takes a minute
    'FOLDER = Path("outputs/first_hour")': 'FOLDER = Path("{folder}")',
    "STEPS, TEST_ROWS = 200, 100": "STEPS, TEST_ROWS = 4, 8",
    "save_steps: 50": "save_steps: 2",
    ".splitlines():": ".splitlines()[:120]:",
}


def text_of(cell) -> str:
    """What a cell has printed and shown."""
    return "".join(
        output.get("text", "") + "".join(output.get("data", {}).get("text/html", "")) for output in cell.outputs
    )


def test_the_notebook_has_at_most_twelve_cells_and_no_output():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) <= 12
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_a_folder_with_a_blank_in_its_name_as_a_mounted_drive_has_it_is_one_word_of_each_command():
    commands = [line for cell in nbformat.read(NOTEBOOK, as_version=4).cells for line in cell.source.splitlines()
                if cell.cell_type == "code" and line.startswith(("!", "%"))]  # fmt: skip
    assert sum("$" in line for line in commands) == 5
    assert not [line for line in commands if re.search(r'(?<!")\$[A-Z]', line)]


@pytest.mark.long
def test_the_notebook_trains_evaluates_shows_its_report_and_answers(tmp_path):
    notebook, folder = nbformat.read(NOTEBOOK, as_version=4), tmp_path / "My Drive"
    for old, new in SMALLER.items():
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        cell.source = cell.source.replace(old, new.format(folder=folder) if "{folder}" in new else new)
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"  # `!python` is this one
    variables = environment(PATH=path, PYTHONPATH=str(PROJECT), TMPDIR=str(tmp_path))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    try:
        client.execute(env=variables)
    finally:
        for started in tmp_path.glob(".tensorboard-info/pid-*.info"):
            os.kill(json.loads(started.read_text())["pid"], signal.SIGTERM)

    *_, preview, _, train, evaluate, report, chat, _ = notebook.cells
    assert "How" in text_of(preview)
    figures = json.loads((folder / "shop/train_metrics.json").read_text())
    assert figures["global_step"] == 4 and "eval loss" in text_of(train)
    assert "report: " in text_of(evaluate)
    assert "<iframe srcdoc=" in text_of(report) and "ROUGE-L" in text_of(report)
    assert "base" in text_of(chat) and "adapter" in text_of(chat)
