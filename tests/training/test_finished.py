"""A finished run has nothing to do only where its data and its result are what they were."""

import json
import subprocess
import sys

import pytest
import torch
from launching import PROJECT
from safetensors.torch import save_file

from carelm.data.sources import hash_files
from carelm.errors import UserError
from carelm.recipe_file import load_recipe, save_recipe
from carelm.training import finished, runs

METRICS = {
    "eval_loss_before": 6.1, "eval_loss": 1.25, "train_loss": 1.5, "global_step": 12, "num_train_tokens": 1000,
    "trainable_parameters": 8, "trainable_percent": 7.9, "precision": "fp32", "world_size": 1, "zero_stage": 0,
    "wall_seconds": 100.0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A finished run on two files of rows, without the training."""
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        rows = [{"q": f"Where is parcel {i} of {name}?", "a": f"Parcel {i} is on its way."} for i in range(8)]
        (tmp_path / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = f"--dataset_name {tmp_path}/data --prompt_template {{q}} --completion_template {{a}} --output_dir {tmp_path}/run"
    recipe = load_recipe(keys.split(), usage="")
    recipe.output_dir.mkdir()
    save_file({"lora_A.weight": torch.arange(8.0)}, recipe.output_dir / "adapter_model.safetensors")
    for name in ("adapter_config.json", "tokenizer.json"):
        (recipe.output_dir / name).write_text('{"some": "settings"}')
    save_recipe(recipe, recipe.output_dir / "recipe.yaml")
    runs.finish(recipe, METRICS | {"data_files": hash_files(recipe)}, {"train": {"rows": 8, "used": 8}})
    return recipe


def change_metrics(run, **changes):
    file = run.output_dir / "train_metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_as_it_was_has_nothing_to_do(run, capsys):
    (run.output_dir / "README.md").write_text("my own card")
    (run.output_dir / "eval").mkdir()
    assert runs.find_finished(run)["global_step"] == 12
    assert capsys.readouterr().err == ""


def test_what_people_say_of_a_run_before_and_after_its_end_is_no_part_of_its_result(run):
    for name in ("feedback.jsonl", "vllm.log", "serving_certificate.json"):
        (run.output_dir / name).write_text("one\n")
    runs.finish(run, METRICS | {"data_files": hash_files(run)}, {"train": {"rows": 8, "used": 8}})
    for name in ("feedback.jsonl", "vllm.log", "serving_certificate.json"):
        (run.output_dir / name).write_text("one\ntwo\n")
    assert runs.find_finished(run)["global_step"] == 12


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda data: (data / "train.jsonl").write_text('{"q": "Hello?", "a": "Hello."}\n'), "train.jsonl has changed"),
        (lambda data: (data / "test.jsonl").unlink(), "test.jsonl is gone"),
        (
            lambda data: (data / "validation.jsonl").write_text('{"q": "Hello?", "a": "Hi."}\n'),
            "validation.jsonl is new",
        ),
    ],
    ids=["changed", "gone", "new"],
)
def test_data_that_differs_is_an_error_with_the_way_on(run, tmp_path, change, line):
    change(tmp_path / "data")
    with pytest.raises(
        UserError, match=f"dataset_name: .* {line}; put it back, go on from it .*--adapter .*, or begin anew"
    ):
        runs.find_finished(run)


def write_bytes(name, change):
    def act(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return act


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is gone"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is gone"),
        (write_bytes("adapter_model.safetensors", lambda b: b[:-4]), "adapter_model.safetensors has .* bytes, not"),
        (write_bytes("adapter_model.safetensors", lambda b: b[:-1] + b"\1"), "adapter_model.safetensors has changed"),
        (write_bytes("adapter_model.safetensors", lambda b: b"\0" * len(b)), "adapter_model.safetensors has changed"),
        (write_bytes("adapter_config.json", lambda b: b""), "adapter_config.json has 0 bytes"),
    ],
    ids=["no weights", "no tokenizer", "cut off", "one bit", "header", "empty"],
)
def test_a_result_that_is_gone_or_damaged_is_an_error_with_the_way_on(run, change, line):
    change(run.output_dir)
    with pytest.raises(UserError, match=f"output_dir: the result .* {line}.*; put it back, begin anew with --restart"):
        runs.find_finished(run)
    (run.output_dir / "checkpoint-12").mkdir()
    with pytest.raises(UserError, match="remove .*train_metrics.json to write it again from its newest checkpoint"):
        runs.find_finished(run)


def test_other_code_is_said_and_the_run_stays_finished(run, tmp_path, capsys):
    change_metrics(run, code_fingerprint="0123456789abcdef", git_commit="abc")
    (tmp_path / "data/validation.jsonl").write_text('{"q": "Hello?", "a": "Hi."}\n')  # that code may not have read it
    assert runs.find_finished(run)["global_step"] == 12
    assert "carelm: the code has changed since this run was trained (commit abc); it stays" in capsys.readouterr().err
    (tmp_path / "data/train.jsonl").write_text('{"q": "Hello?", "a": "Hello."}\n')
    with pytest.raises(UserError, match="train.jsonl has changed"):
        runs.find_finished(run)


def test_data_that_is_not_here_is_said_and_the_run_stays_finished(run, tmp_path, capsys):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert runs.find_finished(run)["global_step"] == 12
    assert "the data of this finished run cannot be read here and is not compared" in capsys.readouterr().err


@pytest.mark.parametrize("recorded, why", [({"data_files": None}, "it is from a hub"), ({}, "an earlier version")])
def test_data_of_a_hub_or_an_earlier_version_is_not_looked_up(run, capsys, recorded, why):
    file = run.output_dir / "train_metrics.json"
    metrics = {key: value for key, value in json.loads(file.read_text()).items() if key != "data_files"}
    file.write_text(json.dumps(metrics | recorded))
    assert runs.find_finished(run)["global_step"] == 12
    assert f"has changed since this run was trained is not looked up ({why}" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_without_its_weights_is_an_error(run):
    file = run.output_dir / "train_metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in metrics.items() if k not in ("result_files", "code_fingerprint")}))
    assert runs.find_finished(run)
    (run.output_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="it holds no .safetensors file"):
        runs.find_finished(run)


def test_more_steps_go_on_from_a_checkpoint_and_never_over_the_result(run):
    run.training["max_steps"] = 24
    with pytest.raises(UserError, match="finished at step 12, and no checkpoint to go on from; begin anew"):
        runs.find_finished(run)
    (run.output_dir / "checkpoint-12").mkdir()
    assert runs.find_finished(run) is None


def test_metrics_that_are_cut_off_are_an_error(run):
    file = run.output_dir / "train_metrics.json"
    file.write_text(file.read_text()[:-30])
    with pytest.raises(UserError, match="train_metrics.json is damaged .*; remove it, and run again"):
        runs.find_finished(run)


def test_the_check_imports_no_torch():
    lines = "import sys; from carelm.training import runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], cwd=PROJECT, check=True)


def test_the_ends_of_a_large_file_count(tmp_path, monkeypatch):
    monkeypatch.setattr(finished, "WHOLE", 2**20)
    file = tmp_path / "model.safetensors"
    content = bytearray(3 * 2**20)
    hashes = []
    for place in (None, 5, -5):
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        hashes.append(finished._size_and_hash(file))
    assert len({str(h) for h in hashes}) == 3 and {h[0] for h in hashes} == {3 * 2**20}
