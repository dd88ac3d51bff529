"""Preferences: the loss of TRL's DPOTrainer, the same curve on every rung, a reference that is the model before step 0, and no
run whose answers vanish."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from launching import (
    PROJECT,
    eval_losses,
    history,
    launch,
    losses,
    made_once,
    mark,
    relative_distance,
    script,
    zero3_sharding_everything,
)
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from carelm.chat.chat import make_chat
from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.training import preferences
from carelm.training.batches import GlobalBatches
from carelm.training.prepared import prepare

THINGS = ("order", "parcel", "refund", "invoice", "return", "jacket", "lamp", "coupon")
BRIEF = ("--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no")


def pairs(number, start=0):
    """Of unlike lengths; what is preferred is longer or shorter than what is not."""
    things = [(THINGS[i % 8], i) for i in range(start, start + number)]
    return [{"prompt": f"Where is my {thing} {i}?", "chosen": f"Your {thing} is on its way." + " Look at your mails." * (i % 3),
             "rejected": f"I do not know{' about it, really, I am sorry' * (i % 2)}. {i}"} for thing, i in things]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fill(folder):
    """A tiny base of random weights with the demo's tokenizer, pairs (30, so that an epoch ends with a batch of two), a recipe,
    and an adapter that it goes on from."""
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "demo/base")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape, **special))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    write(folder / "data/train.jsonl", pairs(30))
    write(folder / "data/validation.jsonl", pairs(6, start=30))
    write(
        folder / "data/test.jsonl", [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in pairs(4, start=40)]
    )
    keys = {
        "model_name_or_path": str(folder / "base"), "dataset_name": str(folder / "data"), "precision": "fp32",
        "max_length": 128, "messages_column": "chosen", "prompt_column": "prompt", "lora_r": 4, "lora_alpha": 16,
        "global_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-3,
        "sample_max_new_tokens": 8, "max_new_tokens": 8, "eval_strategy": "steps", "eval_steps": 4,
        "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip
    start = {"max_steps": 4, "learning_rate": 1e-2, "output_dir": str(folder / "start")}
    (folder / "start.yaml").write_text(yaml.safe_dump(keys | start))
    script("--config", folder / "start.yaml", check=True)
    keys |= {"objective": "preferences", "rejected_column": "rejected"}
    (folder / "new.yaml").write_text(yaml.safe_dump(keys))
    (folder / "pairs.yaml").write_text(yaml.safe_dump(keys | {"adapter": str(folder / "start")}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_once(tmp_path_factory, "preferences", fill)


@pytest.fixture(scope="module")
def one(made, tmp_path_factory):
    """Eight steps that go on from the adapter, on one process."""
    words = ("--config", made / "pairs.yaml", "--output_dir")
    return made_once(tmp_path_factory, "preferred", lambda folder: script(*words, folder / "one", check=True)) / "one"


@pytest.fixture(scope="module")
def two_ranks(made, tmp_path_factory):
    """The same on two ranks under ZeRO-3."""

    def run(folder):
        words = ("--config", made / "pairs.yaml", "--output_dir", folder / "zero3")
        launch(*words, config_file=zero3_sharding_everything(folder))

    return made_once(tmp_path_factory, "preferred-on-two", run) / "zero3"


def assert_same_run(run, one):
    assert len(losses(one)) == 8 and losses(one)[8] < 0.69
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    assert eval_losses(run) == pytest.approx(eval_losses(one), rel=1e-5)
    assert relative_distance(run, one) < 1e-4


def test_one_pair_at_a_time_has_the_curve_and_the_adapter_of_four(one, made, tmp_path):
    """Of the last step's two pairs two of its four micro-batches are left blank."""
    words = ("--config", made / "pairs.yaml", "--output_dir", tmp_path / "run", "--per_device_train_batch_size", 1)
    script(*words, "--per_device_eval_batch_size", 4, "--gradient_checkpointing", "true", check=True)
    assert_same_run(tmp_path / "run", one)


def test_two_ranks_under_zero_3_have_the_curve_and_the_adapter_of_one_process(two_ranks, one):
    assert_same_run(two_ranks, one)


@pytest.mark.long
def test_two_ranks_under_zero_2_have_the_curve_and_the_adapter_of_one_process(one, made, tmp_path):
    words = ("--config", made / "pairs.yaml", "--output_dir", tmp_path / "run")
    launch(*words, config_file=PROJECT / "accelerate_configs/cpu_zero2.yaml")
    assert_same_run(tmp_path / "run", one)


def test_the_first_loss_of_a_run_that_goes_on_from_an_adapter_is_ln_2(one, made):
    assert eval_losses(one)[0] == math.log(2)
    assert losses(one)[1] == pytest.approx(math.log(2), abs=1e-7)
    assert relative_distance(one, made / "start") > 1e-3  # it has trained on from there


def test_the_first_loss_of_a_new_adapter_on_a_base_in_4_bits_is_ln_2(made, tmp_path):
    words = ("--config", made / "new.yaml", "--output_dir", tmp_path / "run", "--load_in_4bit", "true")
    done = script(*words, *BRIEF, check=True)
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["eval_loss_before"] == math.log(2)
    assert metrics["train_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert re.search(r"eval loss 0.6931 -> \S+, chosen loss \S+ -> \S+, answers of \S+ -> \S+ tokens", done.stderr)
    assert "| loss of preferred answers before |" in (tmp_path / "run/README.md").read_text()
    assert {w.dtype for w in load_file(tmp_path / "run/adapter_model.safetensors").values()} == {torch.float32}


def test_a_full_fine_tune_has_its_own_start_as_reference_and_answers_add_their_loss_by_weight(made, tmp_path):
    words = (
        "--config",
        made / "new.yaml",
        "--output_dir",
        tmp_path / "run",
        "--method",
        "full",
        "--answer_weight",
        0.5,
    )
    metrics = json.loads(script(*words, *BRIEF, check=True).stdout.splitlines()[-1])
    assert metrics["eval_loss_before"] == pytest.approx(
        math.log(2) + 0.5 * metrics["eval_chosen_loss_before"], rel=1e-9
    )
    assert metrics["train_loss"] > math.log(2) + 1


def test_the_loss_of_preferred_answers_is_that_of_training_on_answers(one, made):
    before = next(e["eval_chosen_loss"] for e in history(one) if e["step"] == 0)
    assert before == pytest.approx(eval_losses(made / "start")[4], rel=1e-6)


def test_the_losses_are_those_of_trls_trainer(one, made, tmp_path):
    """On the same pairs in the same steps, from the same adapter."""
    from datasets import Dataset
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=self.data_collator)

    recipe = load_recipe(["--config", str(made / "pairs.yaml")], usage="")
    train = prepare(recipe, make_chat(recipe)).train
    steps = GlobalBatches(train.lengths, global_batch_size=4, micro_batch_size=4, rank=0, ranks=1, seed=42).plan(0)
    steps, rows = [step.tolist() for step in steps], []
    for (ids, trained), (others, _) in map(train.pair, range(len(train))):
        start = int(np.flatnonzero(trained)[0])
        rows.append({"prompt_ids": ids[:start].tolist(), "chosen_ids": ids[start:].tolist(),
                     "rejected_ids": others[start:].tolist()})  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(made / "base")
    trainer = OfTokens(
        PeftModel.from_pretrained(base, made / "start", is_trainable=True),
        args=DPOConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-3, lr_scheduler_type="cosine",
            warmup_steps=0.03, logging_steps=1, report_to="none", save_strategy="no", bf16=False, use_cpu=True,
            max_length=None, gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(made / "base"),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [*losses(one).values()] == pytest.approx(theirs, abs=1e-6)


def test_a_run_stopped_on_two_ranks_is_finished_on_one(two_ranks, one, made, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    (run / "train_metrics.json").unlink()
    shutil.rmtree(run / "checkpoint-8")
    before = (run / "reference.npz").read_bytes()
    done = script("--config", made / "pairs.yaml", "--output_dir", run, check=True)
    assert f"going on from {run / 'checkpoint-4'}" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 1
    assert (run / "reference.npz").read_bytes() == before
    assert_same_run(run, one)


def test_a_run_without_its_reference_is_refused_before_weights_are_loaded(one, made, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    for name in ("train_metrics.json", "reference.npz"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-8")
    done = script("--config", made / "pairs.yaml", "--output_dir", run)
    assert done.returncode == 2 and "parameters are trained" not in done.stderr
    assert "what the model that this run began as says to its pairs, is not there" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("part", [0, 0.5])
def test_a_reference_that_was_cut_off_is_none(tmp_path, part):
    np.savez(file := tmp_path / "reference.npz", about="{}", train=np.zeros((9, 2)))
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    assert preferences._read(file) is None


def test_what_an_earlier_start_that_saved_nothing_has_asked_is_asked_again(tmp_path, monkeypatch):
    trainer = preferences.PreferenceTrainer.__new__(preferences.PreferenceTrainer)
    args = SimpleNamespace(fp16=False, bf16=False, device=torch.device("cpu"))
    recipe, prepared = SimpleNamespace(output_dir=tmp_path, bits=4), SimpleNamespace(fingerprint="rows")
    vars(trainer).update(
        recipe=recipe, prepared=prepared, args=args, base_fingerprint="base", adapter_fingerprint=None,
        train_dataset=SimpleNamespace(), eval_dataset=None,
    )  # fmt: skip
    for number in (1.0, 2.0):
        monkeypatch.setattr(trainer, "_answer_tokens", lambda number=number: number, raising=False)
        monkeypatch.setattr(trainer, "_log_probabilities", lambda _, n=number: np.full((3, 2), n), raising=False)
        for goes_on in (False, True):
            trainer._know_reference(goes_on)
            assert (trainer.train_dataset.reference == number).all() and trainer.answer_tokens_before == number


def test_a_reference_of_another_start_is_refused(one, made):
    recipe = load_recipe(["--config", str(made / "pairs.yaml"), "--output_dir", str(one)], usage="")
    prepared, begun = prepare(recipe, make_chat(recipe)), mark(one, 4)
    preferences.check_reference(recipe, prepared, "fp32", begun)
    with pytest.raises(
        UserError, match=r"is of another start \(adapter: .* there, 0123 here\); put the run's own back"
    ):
        preferences.check_reference(recipe, prepared, "fp32", begun | {"adapter_fingerprint": "0123"})
    with pytest.raises(UserError, match=r"\(precision: fp32 there, bf16 here\); set precision: fp32"):
        preferences.check_reference(recipe, prepared, "bf16", begun)


def test_the_log_has_the_likelihood_of_preferred_answers_and_the_length_of_its_own(one):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    entries = [e for e in history(one) if "eval_loss" in e]
    assert [e["step"] for e in entries] == [0, 4, 8]
    assert entries[2]["eval_chosen_loss"] < entries[0]["eval_chosen_loss"]
    assert all(0 <= e["eval_answer_tokens"] <= 8 for e in entries)
    events = EventAccumulator(str(one / "runs"))
    events.Reload()
    for tag, key in (("eval/chosen_loss", "eval_chosen_loss"), ("eval/answer_tokens", "eval_answer_tokens")):
        assert [s.value for s in events.Scalars(tag)] == pytest.approx([e[key] for e in entries])


def test_a_run_whose_answers_vanish_ends_with_a_line(made, tmp_path):
    """Most of the preferred answers are one word, and the model comes to say nothing else."""
    rows = [row | {"chosen": row["chosen"] * 2 if i % 4 == 0 else "No"} for i, row in enumerate(pairs(40))]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", rows)
    write(tmp_path / "data/validation.jsonl", [row | {"prompt": row["prompt"] + " Now?"} for row in rows])
    done = script("--config", made / "new.yaml", "--output_dir", tmp_path / "run", "--dataset_name", tmp_path / "data",
                  "--method", "full", "--learning_rate", 1e-2, "--answer_weight", 1, "--max_steps", 40,
                  "--eval_steps", 10, "--save_strategy", "no", "--sample_max_new_tokens", 32)  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: learning_rate: at step "), done.stderr[-2000:]
    assert "tokens on average" in last and not (tmp_path / "run/train_metrics.json").exists()


def test_a_base_with_an_encoder_is_refused_before_its_data_is_prepared(made):
    recipe = load_recipe(
        ["--config", str(made / "new.yaml"), "--model_name_or_path", str(PROJECT / "demo/t5")], usage=""
    )
    with pytest.raises(UserError, match="objective: preferences is not for a base with an encoder, as .*demo/t5 is"):
        prepare(recipe, make_chat(recipe))


def test_the_evaluator_compares_answers_with_the_preferred_ones(one, made, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    script("--config", made / "pairs.yaml", "--output_dir", run, "--models", "adapter", "--num_latency_prompts", 0,
           "--num_resamples", 10, file="eval/run.py", check=True)  # fmt: skip
    rows = [json.loads(line) for line in (run / "eval/predictions-adapter.jsonl").read_text().splitlines()]
    assert [row["references"][0] for row in rows] == [row["chosen"] for row in pairs(4, start=40)]
