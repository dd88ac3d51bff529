"""The recipes on real public rows (the folder that CARELM_DATA names), a few steps each."""

import json

import pytest
from launching import script

FEW_STEPS = ("--max_steps", 2, "--global_batch_size", 4, "--max_samples", 24, "--max_eval_samples", 4, "--eval_strategy", "no",
             "--num_sample_answers", 1, "--sample_max_new_tokens", 8, "--save_strategy", "no")  # fmt: skip


@pytest.mark.parametrize("name", ["bitext_support", "medquad", "sgd", "tau_airline_toolcalls"])
def test_a_recipe_trains_on_its_real_rows(name, carelm_data, tmp_path):
    done = script("--config", f"recipes/{name}.yaml", "--dataset_name", carelm_data / name, "--output_dir", tmp_path / "run",
                  *FEW_STEPS, check=True)  # fmt: skip
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["global_step"] == 2 and metrics["eval_loss"] < metrics["eval_loss_before"]


def test_preview_shows_the_answer_as_trained_and_writes_nothing(carelm_data, tmp_path):
    done = script("--config", "recipes/bitext_support.yaml", "--dataset_name", carelm_data / "bitext_support",
                  "--output_dir", tmp_path / "run", "--preview", 2)  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("\033[7;32m") == 2 and not (tmp_path / "run").exists()
    first = json.loads((carelm_data / "bitext_support/train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert f"\033[7;32m{first['response']}<|eot_id|>\033[0m" in done.stdout
