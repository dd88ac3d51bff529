"""A server whose shop cannot be searched does not start: one line says why, with the command that mends it."""

import json
import runpy

import pytest
from conftest import PROJECT

pytest.importorskip("lancedb")
from shop import shop_keys, write_documents

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval.update import update


@pytest.fixture
def open_shop():
    return runpy.run_path(str(PROJECT / "serve/run.py"))["open_shop"]


def test_an_index_that_is_missing_or_half_built_is_one_line_with_the_command(tmp_path, open_shop, monkeypatch):
    documents = write_documents(tmp_path / "documents")
    recipe = load_recipe([*shop_keys(documents), "--output_dir", str(tmp_path / "run")], usage="")
    with pytest.raises(UserError, match="index: .*passages is not there yet; make it: python serve/index.py --config"):
        open_shop(recipe)
    (tmp_path / "run/index/passages/1.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="index: .*passages is half built; make it: python serve/index.py --config"):
        open_shop(recipe)
    words = ["serve/run.py", "--config", "my shop.yaml", "--port", "1", "--embedder", "e5", "--models", "base"]
    monkeypatch.setattr("sys.argv", [*words, "--documents", "a", "b", "--host=::1"])
    with pytest.raises(UserError, match="--config 'my shop.yaml' --embedder e5 --documents a b$"):
        open_shop(recipe)
    update(recipe)
    assistant, tickets = open_shop(recipe)
    assert assistant.look_up([{"role": "user", "content": "lamps?"}]) and tickets is None


def test_without_documents_there_is_no_shop_and_a_question_of_columns_has_none_either(tmp_path, open_shop, capsys):
    assert open_shop(load_recipe([], usage="")) == (None, None)
    keys = {
        "dataset_name": "x.jsonl",
        "prompt_template": "{a} {b}",
        "completion_template": "{c}",
        "documents": ["docs"],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(keys))
    assert open_shop(load_recipe(["--config", str(tmp_path / "r.yaml")], usage="")) == (None, None)
    assert "documents: no shop assistant, for prompt_template has several columns" in capsys.readouterr().err
