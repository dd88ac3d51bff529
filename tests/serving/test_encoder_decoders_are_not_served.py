"""An encoder-decoder is refused by name by each way of serving, before anything is loaded."""

import runpy
import sys

import pytest
from conftest import PROJECT

from carelm.errors import UserError
from carelm.evaluation.candidates import find
from carelm.recipe_file import load_recipe
from carelm.serving.vllm_command import servable


@pytest.mark.parametrize("engine", ["batcher", "vllm"])
def test_neither_engine_serves_it(monkeypatch, tmp_path, engine):
    pytest.importorskip("fastapi")
    words = [
        "--model_name_or_path",
        "demo/t5",
        "--models",
        "base",
        "--output_dir",
        str(tmp_path / "run"),
        "--engine",
        engine,
    ]
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["serve/run.py", *words])
    with pytest.raises(
        UserError, match="^models: base is an encoder-decoder, which neither engine serves; train/chat.py"
    ):
        runpy.run_path("serve/run.py")["main"]()


def test_nor_is_it_exported_for_vllm_and_ollama():
    recipe = load_recipe(["--model_name_or_path", str(PROJECT / "demo/t5"), "--models", "base"], usage="")
    with pytest.raises(
        UserError, match="^models: base cannot be served by vLLM: it is an encoder-decoder.*chat.py talks"
    ):
        servable(recipe, [find(recipe, "base")])
