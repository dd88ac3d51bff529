"""The Hub: --push_to_hub against a stub of its client, and a download from a small Hub on this machine."""

import json
import subprocess
import types
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import yaml
from hub_server import serve
from launching import PROJECT, VENV, environment, launch

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.training import hub, runs

METRICS = {
    "eval_loss_before": 6.1, "eval_loss": 1.25, "train_loss": 1.5, "global_step": 120, "num_train_tokens": 1000,
    "num_trained_tokens": 300,
    "trainable_parameters": 299_008, "trainable_percent": 7.9, "precision": "fp32", "world_size": 1, "zero_stage": 0,
    "wall_seconds": 100.0,
}  # fmt: skip
REPORT = {"train": {"rows": 10, "used": 9}}


class StubApi:
    calls: list = []

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create_repo", name, private))
        return types.SimpleNamespace(repo_id=f"shop/{name}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        self.calls.append(("upload_folder", repo_id, folder_path, ignore_patterns))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", StubApi)
    StubApi.calls = []
    (tmp_path / "out").mkdir()
    keys = f"--push_to_hub --hub_model_id care --hub_token hf_secret --output_dir {tmp_path / 'out'}"
    return load_recipe(keys.split(), usage="")


def test_a_finished_run_is_uploaded_with_its_card_and_without_checkpoints(recipe):
    runs.finish(recipe, METRICS, REPORT)
    assert ("token", "hf_secret") in StubApi.calls and ("create_repo", "care", None) in StubApi.calls
    (_, repo_id, folder, ignored), = [c for c in StubApi.calls if c[0] == "upload_folder"]  # fmt: skip
    assert repo_id == "shop/care" and folder == recipe.output_dir
    beside = ["feedback.jsonl", "chats/chat-1.jsonl", "index/passages/1/data.lance", "vllm.log", "checkpoint-9/a.safetensors",
              "answers/train/draw-1/predictions-base.jsonl", "embedder/model.safetensors", "runs/events",
              "eval/report.html"]  # fmt: skip
    result = ["adapter_model.safetensors", "README.md", "train_metrics.json"]
    assert list(huggingface_hub.utils.filter_repo_objects([*beside, *result], ignore_patterns=ignored)) == result
    card = (recipe.output_dir / "README.md").read_text()
    # They are folders here, which the Hub refuses in a card.
    assert "datasets:" not in card and "base_model:" not in card
    for words in ("demo/data", "lora on a 4-bit base", "| eval loss | 1.25 |", "| eval loss before | 6.1 |", "9 of 10",
                  "| trained tokens (of the answers) | 300 |", "| tokens read (prompts too) | 1000 |"):  # fmt: skip
        assert words in card


def test_the_card_names_the_hub_datasets_of_also_train_too(recipe, tmp_path):
    mixed = []
    for name, dataset in (("a", "shop/tickets"), ("b", "shop/tickets"), ("c", "clinic/talks"), ("d", "demo/data")):
        keys = f"dataset_name: {dataset}\nprompt_template: '{{q}}'\ncompletion_template: '{{a}}'\n"
        (tmp_path / f"{name}.yaml").write_text(keys)
        mixed.append(f"{tmp_path / name}.yaml: all")
    also_train = ("--also_train", "{" + ", ".join(mixed) + "}")
    card = hub.model_card(load_recipe([*also_train], usage=""), METRICS, REPORT)
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["shop/tickets", "clinic/talks"]


def test_the_card_of_a_run_that_goes_on_names_the_hub_datasets_of_the_adapters_before_it(tmp_path):
    earlier = {"adapter": None}
    for name, dataset in (("first", "shop/tickets"), ("second", "rows.csv"), ("third", "clinic/talks")):
        (tmp_path / name).mkdir()
        keys = {"dataset_name": dataset, "prompt_template": "{q}", "completion_template": "{a}", **earlier}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in keys.items() if v}))
        earlier = {"adapter": str(tmp_path / name)}
    recipe = load_recipe(
        ["--config", str(tmp_path / "third/recipe.yaml"), "--output_dir", str(tmp_path / "out")], usage=""
    )
    before = hub.trained_before(recipe)
    metrics = METRICS | {"adapter_fingerprint": "0123", "trained_before": before}
    card = hub.model_card(recipe, metrics, REPORT)
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["clinic/talks", "shop/tickets"]
    assert f"from the adapter `{tmp_path}/second` (fingerprint 0123), which was trained on `" in card
    assert "rows.csv`, and before that on `shop/tickets`." in card

    (tmp_path / "first/recipe.yaml").unlink()
    card = hub.model_card(recipe, metrics | {"trained_before": hub.trained_before(recipe)}, REPORT)
    assert "rows.csv`, and before that on what is not known here." in card
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["clinic/talks"]


def test_the_token_is_in_no_file(recipe):
    runs.finish(recipe, METRICS, REPORT)
    from carelm.recipe_file import save_recipe

    save_recipe(recipe, recipe.output_dir / "recipe.yaml")
    for file in filter(Path.is_file, recipe.output_dir.rglob("*")):
        assert b"hf_secret" not in file.read_bytes(), file


def test_a_refusal_of_the_hub_is_one_line_and_the_run_stays_saved(recipe, monkeypatch):
    file = recipe.output_dir / "train_metrics.json"
    for problem in (OSError("401 Unauthorized\nmore"), ValueError("Invalid metadata in README.md.")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="the Hub refused care .(401|Invalid)"):
            patch.setattr(StubApi, "create_repo", mock.Mock(side_effect=problem))
            runs.finish(recipe, METRICS, REPORT)
        assert json.loads((recipe.output_dir / "data_report.json").read_text()) == REPORT
        assert "pushed_to" not in json.loads(file.read_text())

    published = runs.publish(recipe, METRICS)  # as the same command does, which finds the run finished
    assert published["pushed_to"] == json.loads(file.read_text())["pushed_to"]
    uploads = len(StubApi.calls)
    assert runs.publish(recipe, published) == published and len(StubApi.calls) == uploads


@pytest.mark.long
def test_what_was_prefetched_trains_without_a_network(tmp_path):
    keys = ("--model_name_or_path", "shop/base", "--dataset_name", "shop/talks", "--output_dir", tmp_path / "run")
    home = {"HF_HOME": str(tmp_path / "home"), "VENV": str(VENV)}
    with serve({"models/shop/base": PROJECT / "demo/base", "datasets/shop/talks": PROJECT / "demo/data"}) as address:
        words = ["bash", PROJECT / "slurm/train.sh", "--prefetch", "recipes/demo.yaml", *map(str, keys)]
        variables = environment(HF_ENDPOINT=address, **home)
        done = subprocess.run(words, cwd=PROJECT, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train 1960 rows, validation 150 rows, test 300 rows" in done.stderr
    few = ("--max_steps", 1, "--max_samples", 24, "--max_eval_samples", 4, "--num_sample_answers", 0)
    done = launch("--config", "recipes/demo.yaml", *keys, *few, HF_ENDPOINT=address, HF_HUB_OFFLINE="1", **home)
    assert json.loads(done.stdout.splitlines()[-1])["global_step"] == 1
