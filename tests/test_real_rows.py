"""The recipes on real public rows (the folder that CARELM_DATA names), a few steps each."""

import json

import pytest
from launching import PROJECT, launch, script

OVERLAY = "recipes/overlays/demo_base.yaml"
FEW_STEPS = ("--max_steps", 2, "--global_batch_size", 4, "--max_samples", 24, "--max_eval_samples", 4, "--eval_strategy", "no",
             "--num_sample_answers", 1, "--sample_max_new_tokens", 8, "--save_strategy", "no")  # fmt: skip


@pytest.mark.parametrize("name", ["medquad", "sgd", "tau_airline_toolcalls"])
def test_a_recipe_trains_on_its_real_rows(name, carelm_data, tmp_path):
    metrics = figures(script(*keys(name, carelm_data, tmp_path), check=True))
    assert metrics["global_step"] == 2 and metrics["eval_loss"] < metrics["eval_loss_before"]


@pytest.mark.long
def test_bitext_support_trains_on_two_ranks(carelm_data, tmp_path):
    two_ranks = PROJECT / "accelerate_configs/cpu_zero2.yaml"
    metrics = figures(launch(*keys("bitext_support", carelm_data, tmp_path), config_file=two_ranks))
    assert (metrics["world_size"], metrics["zero_stage"], metrics["bits"]) == (2, 2, 4)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def keys(name, carelm_data, folder):
    recipe, rows = f"recipes/datasets/{name}.yaml", carelm_data / name
    return ("--config", recipe, "--config", OVERLAY, "--dataset_name", rows, "--output_dir", folder / "run", *FEW_STEPS)


def figures(done):
    return json.loads(done.stdout.splitlines()[-1])


def test_preview_shows_the_answer_as_trained_and_writes_nothing(carelm_data, tmp_path):
    done = script("--config", "recipes/datasets/bitext_support.yaml", "--config", OVERLAY, "--dataset_name",
                  carelm_data / "bitext_support", "--output_dir", tmp_path / "run", "--preview", 2)  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("\033[7;32m") == 2 and not (tmp_path / "run").exists()
    first = json.loads((carelm_data / "bitext_support/train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert f"\033[7;32m{first['response']}<|eot_id|>\033[0m" in done.stdout
