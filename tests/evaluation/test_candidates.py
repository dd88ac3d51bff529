"""What the evaluator knows of a model before it is loaded."""

import hashlib
import json
import socket

import psutil
import pytest

from carelm.data.sources import hash_files
from carelm.errors import UserError
from carelm.evaluation import candidates
from carelm.evaluation.candidates import Candidate
from carelm.recipe_file import load_recipe, save_recipe


def test_data_that_has_changed_since_an_adapter_was_trained_on_it_is_named(tmp_path):
    rows, run = tmp_path / "tickets.csv", tmp_path / "run"
    rows.write_text("question,reply\na,b\n")
    keys = ["--dataset_name", str(rows), "--prompt_template", "{question}", "--completion_template", "{reply}"]
    recipe = load_recipe([*keys, "--output_dir", str(run)], usage="")
    run.mkdir()
    save_recipe(recipe, run / "recipe.yaml")
    (run / "train_metrics.json").write_text(json.dumps({"data_files": hash_files(recipe)}))
    adapter = Candidate(name="adapter", kind="adapter", recipe=recipe, adapter=run, home=recipe.base)
    assert adapter.changed_data(recipe) == []
    rows.write_text("question,reply\na,b\nc,d\n")
    assert adapter.changed_data(recipe) == ["tickets.csv"]
    assert Candidate(name="base", kind="base", recipe=recipe, adapter=None, home=recipe.base).changed_data(recipe) == []


def test_rows_that_were_mixed_in_are_no_change_of_the_data_that_is_tested_on(tmp_path):
    rows, other, run = tmp_path / "tickets.csv", tmp_path / "other.yaml", tmp_path / "run"
    rows.write_text("question,reply\na,b\n")
    (tmp_path / "more.csv").write_text("question,reply\nc,d\n")
    templates = {"prompt_template": "{question}", "completion_template": "{reply}"}
    other.write_text(json.dumps(templates | {"dataset_name": str(tmp_path / "more.csv")}))
    keys = ["--dataset_name", str(rows), *(word for key, text in templates.items() for word in (f"--{key}", text))]
    plain = load_recipe(keys, usage="")
    mixed = load_recipe([*keys, "--also_train", json.dumps({str(other): "all"}), "--output_dir", str(run)], usage="")
    run.mkdir()
    save_recipe(mixed, run / "recipe.yaml")
    (run / "train_metrics.json").write_text(json.dumps({"data_files": hash_files(mixed)}))
    adapter = Candidate(name="adapter", kind="adapter", recipe=plain, adapter=run, home=plain.base)
    assert len(hash_files(mixed)) == 3 and adapter.changed_data(plain) == adapter.changed_data(mixed) == []
    rows.write_text("question,reply\na,e\n")
    assert adapter.changed_data(plain) == adapter.changed_data(mixed) == ["tickets.csv"]


def test_a_data_file_is_read_once_however_many_adapters_were_trained_on_it(tmp_path, monkeypatch):
    rows = tmp_path / "tickets.csv"
    rows.write_text("question,reply\na,b\n")
    keys = ["--dataset_name", str(rows), "--prompt_template", "{question}", "--completion_template", "{reply}"]
    adapters = []
    for name in ("one", "two", "three"):
        recipe = load_recipe([*keys, "--output_dir", str(tmp_path / name)], usage="")
        (tmp_path / name).mkdir()
        save_recipe(recipe, tmp_path / name / "recipe.yaml")
        (tmp_path / name / "train_metrics.json").write_text(json.dumps({"data_files": {"tickets.csv": "another"}}))
        adapters.append(Candidate(name=name, kind="adapter", recipe=recipe, adapter=tmp_path / name, home=recipe.base))
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    assert [adapter.changed_data(recipe) for adapter in adapters] == [["tickets.csv"]] * 3
    assert read == [str(rows)]


def test_a_training_that_was_stopped_is_told_from_one_that_was_not_begun(tmp_path):
    (tmp_path / "checkpoint-13").mkdir()
    recipe = load_recipe(["--output_dir", str(tmp_path)], usage="")
    with pytest.raises(UserError, match="saved at step 13 and not finished; the same training command goes on"):
        candidates.find(recipe, "adapter")


def test_a_training_that_is_running_is_told_from_one_that_was_stopped(tmp_path):
    holder = psutil.Process().ppid()
    (tmp_path / ".lock").write_text(f"process {holder} on {socket.gethostname()}\n")
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "checkpoint-13").mkdir()
    recipe = load_recipe(["--output_dir", str(tmp_path)], usage="")
    for name in ("adapter", str(tmp_path)):
        with pytest.raises(UserError, match="holds no model and no adapter; a training is writing there now; wait"):
            candidates.find(recipe, name)
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match=f"not finished; .* or take {tmp_path}/checkpoint-13 as it is"):
        candidates.find(recipe, str(tmp_path))
