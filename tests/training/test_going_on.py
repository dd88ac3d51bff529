"""A run that goes on from an adapter: it begins where that one ended, says from which, and takes no other for it."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from drawn import make_adapter
from launching import eval_losses, launch, losses, relative_distance, script, torchrun, zero3_sharding_everything
from safetensors.torch import load_file, save_file

from carelm.adapter_folder import adapter_fingerprint, check_adapter
from carelm.errors import UserError
from carelm.files import write_whole
from carelm.models import adapters
from carelm.recipe_file import load_recipe, save_recipe
from carelm.training import runs

SHORT = ("--max_samples", 24, "--max_eval_samples", 6, "--global_batch_size", 4, "--num_sample_answers", 0, "--max_steps", 4,
         "--eval_steps", 4, "--save_steps", 2)  # fmt: skip
LORA = ("--lora_r", 4, "--lora_alpha", 16, "--rank_pattern", '{"up_proj": 2}', "--layers_to_transform", 1, 3)
PROMPT = ("--method", "prompt_tuning", "--num_virtual_tokens", 7)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """An adapter of LoRA and one of prompt tuning, with drawn weights."""
    folder = tmp_path_factory.mktemp("drawn")
    make_adapter(folder / "lora", *map(str, LORA))
    make_adapter(folder / "prompt", *PROMPT[:2], "--num_virtual_tokens", "7")
    return folder


@pytest.mark.parametrize("method", [LORA, pytest.param(PROMPT, marks=pytest.mark.long)], ids=["lora", "prompt_tuning"])
def test_it_begins_with_the_loss_that_the_adapter_ended_with_and_goes_on_on_two_ranks(tmp_path, method):
    words = (
        Path("recipes/demo.yaml").read_text().replace("lora_r: 64\nlora_alpha: 256\n", "").replace("method: lora\n", "")
    )
    (tmp_path / "week.yaml").write_text(words)  # names nothing that the adapter decides
    config = ("--config", tmp_path / "week.yaml", *SHORT)
    first = json.loads(script(*config, *method, "--output_dir", tmp_path / "first", check=True).stdout.splitlines()[-1])
    second = ("--output_dir", tmp_path / "second", "--adapter", tmp_path / "first", "--split_seed", 42)
    done = script(*config, *second, check=True)
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert first["eval_loss"] != pytest.approx(first["eval_loss_before"], rel=1e-4)
    assert metrics["eval_loss_before"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert metrics["trainable_parameters"] == first["trainable_parameters"]
    assert metrics["adapter"] == str(tmp_path / "first")
    assert metrics["adapter_fingerprint"] == adapter_fingerprint(tmp_path / "first")
    assert metrics["adapter_fingerprint"] in (tmp_path / "second/README.md").read_text()
    again = script(*config, *second, check=True)
    assert "finished at step 4; nothing to do" in again.stderr

    whole = losses(tmp_path / "second")
    (tmp_path / "second/train_metrics.json").unlink()
    shutil.rmtree(tmp_path / "second/checkpoint-4")
    change_weights(tmp_path / "first", lambda weights, name: weights[name].mul_(2))
    refused = script(*config, *second)
    assert refused.returncode == 2
    assert re.search(r"error: adapter: \S+/first is not what \S+/checkpoint-2 began with", refused.stderr)
    shutil.rmtree(tmp_path / "first")
    done = torchrun(2, *config, *second)
    assert f"going on from {tmp_path / 'second/checkpoint-2'}" in done.stderr
    assert "is not here any more; " in done.stderr
    resumed = json.loads(done.stdout.splitlines()[-1])
    assert resumed["adapter_fingerprint"] == metrics["adapter_fingerprint"]
    assert metrics["adapter_fingerprint"] in (tmp_path / "second/README.md").read_text()
    assert losses(tmp_path / "second") == pytest.approx(whole, rel=1e-5)
    assert resumed["world_size"] == 2

    again = script(*config, *second, check=True)
    assert "gone on from is not here and is not compared" in again.stderr and "nothing to do" in again.stderr


@pytest.mark.long
def test_weights_beside_the_adapter_begin_as_they_ended_under_zero_3_on_two_ranks(tmp_path):
    keys = (*SHORT, "--lora_r", 4, "--lora_modules_to_save", "lm_head", "norm", "--load_in_4bit", "false")
    first, alone = tmp_path / "first", tmp_path / "alone"
    script("--output_dir", first, *keys, check=True)
    script("--output_dir", alone, "--adapter", first, *keys, check=True)
    config_file = zero3_sharding_everything(tmp_path)
    launch("--output_dir", tmp_path / "two", "--adapter", first, *keys, config_file=config_file)
    assert eval_losses(tmp_path / "two") == pytest.approx(eval_losses(alone), rel=1e-5)
    assert eval_losses(alone)[0] == pytest.approx(eval_losses(first)[4], rel=1e-6)
    assert relative_distance(tmp_path / "two", alone) < 1e-4


def recipe_of(tmp_path, adapter, *keys):
    base = ("--model_name_or_path", "demo/base", "--prompt_template", "{q}", "--completion_template", "{a}")
    (tmp_path / "small.yaml").write_text("seed: 42\n")
    words = ["--config", tmp_path / "small.yaml", *base, "--adapter", adapter, "--output_dir", tmp_path / "out", *keys]
    return load_recipe([*map(str, words)], usage="")


def test_the_adapter_decides_what_the_recipe_leaves_out(tmp_path, drawn):
    recipe = recipe_of(tmp_path, drawn / "lora")
    assert (recipe.method, recipe.model["lora_r"], recipe.model["lora_alpha"]) == ("lora", 4, 16)
    assert (recipe.layers_to_transform, recipe.rank_pattern) == ([1, 3], {"up_proj": 2})
    recipe = recipe_of(tmp_path, drawn / "prompt")
    assert (recipe.method, recipe.num_virtual_tokens) == ("prompt_tuning", 7)


@pytest.mark.parametrize(
    "keys", [(), ("--lora_target_modules", "all-linear"), ("--lora_r", "4", "--lora_dropout", "0.1")]
)
def test_its_weights_are_the_adapters(tmp_path, drawn, keys):
    recipe = recipe_of(tmp_path, drawn / "lora", *keys)
    check_adapter(recipe)
    adapters.check_base(recipe)
    from carelm.chat.chat import make_chat
    from carelm.models.precision import choose_precision

    model = adapters.load_model(recipe, make_chat(recipe), choose_precision("fp32"))
    stored = load_file(drawn / "lora/adapter_model.safetensors")
    own = adapters.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in own)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    write_whole(file, json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights, sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")


def whole_model(folder):
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text("{}")


def of_another_base(folder):
    (folder / "train_metrics.json").write_text('{"base_fingerprint": "0123456789abcdef"}')


@pytest.mark.parametrize(
    "kind, change, keys, line",
    [
        ("lora", shutil.rmtree, (), "adapter: there is no folder"),
        ("lora", whole_model, (), "adapter: .* is a whole model .* set model_name_or_path to it"),
        ("lora", lambda f: (f / "adapter_config.json").unlink(), (), "adapter: .* holds no adapter_config.json"),
        ("lora", lambda f: (f / "adapter_model.safetensors").unlink(), (), "adapter: .* has no adapter_model.safetensors"),
        ("lora", lambda f: (f / "adapter_config.json").write_text("[]"), (), "adapter: .* is no JSON object"),
        ("lora", lambda f: (f / "adapter_config.json").write_text("{"), (), "adapter_config.json is damaged"),
        ("lora", lambda f: change_config(f, peft_type="IA3"), (), "adapter: .* is of the kind IA3"),
        ("lora", lambda f: change_config(f, r="eight"), (), "lora_r: 'eight' is not of type int"),
        ("lora", lambda f: change_config(f, bias="all"), (), "adapter: .* has bias: 'all', which"),
        ("lora", lambda f: change_config(f, init_lora_weights="pissa"), (), "adapter: .* began as pissa"),
        ("lora", lambda f: change_config(f, use_rslora=True), ("--use_rslora", "false"), "use_rslora: False is not what"),
        ("lora", None, ("--lora_r", "8"), "lora_r: 8 is not what the adapter .* has, 4; leave it out"),
        ("lora", None, ("--lora_alpha", "8"), "lora_alpha: 8 is not what the adapter .* has, 16"),
        ("lora", None, ("--layers_to_transform", "1"), "layers_to_transform: .1. is not what"),
        ("lora", None, ("--rank_pattern", '{"up_proj": 4}'), "rank_pattern: .* is not what"),
        ("lora", None, ("--lora_target_modules", "up_proj"), "lora_target_modules: .'up_proj'. are not the modules"),
        ("lora", None, ("--method", "prompt_tuning", "--layers_to_transform", "null", "--rank_pattern", "null"),
         "method: 'prompt_tuning' is not what the adapter .* has, 'lora'"),
        ("lora", None, ("--method", "full", "--layers_to_transform", "null", "--rank_pattern", "null"),
         "adapter: method: full trains no adapter"),
        ("prompt", None, ("--num_virtual_tokens", "5"), "num_virtual_tokens: 5 is not what the adapter .* has, 7"),
        ("prompt", lambda f: change_config(f, num_virtual_tokens=5), (), "adapter: .* prompt_embeddings is .7, 256. there"),
        ("lora", of_another_base, (), "adapter: .* was trained on another base than .*demo/base"),
        ("lora", lambda f: change_weights(f, lambda w, n: w.pop(n)), (), "adapter: .* does not fit .* is missing there"),
        ("lora", lambda f: change_weights(f, lambda w, n: w.update({n: w[n][:, :9].clone()})), (), "adapter: .* does not fit"),
        ("lora", lambda f: change_weights(f, lambda w, n: w[n].fill_(float("nan"))), (), "adapter: .* holds NaN or infinity"),
        ("lora", lambda f: (f / "adapter_model.safetensors").write_bytes(b"torn"), (), "adapter: .* is damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_gone_on_with_is_one_line_before_any_weights(tmp_path, drawn, kind, change, keys, line):
    folder = shutil.copytree(drawn / kind, tmp_path / "adapter")
    if change is not None:
        change(folder)
    with pytest.raises(UserError, match=line) as caught:
        recipe = recipe_of(tmp_path, folder, *keys)
        check_adapter(recipe)
        adapters.check_base(recipe)
    assert "\n" not in str(caught.value)


def test_the_runs_own_folder_is_no_start(tmp_path, drawn):
    folder = shutil.copytree(drawn / "lora", tmp_path / "out/checkpoint-3")
    for own in (folder, shutil.copytree(folder, tmp_path / "out", dirs_exist_ok=True)):
        with pytest.raises(UserError, match="lies in output_dir, where this run writes"):
            check_adapter(recipe_of(tmp_path, own))


def test_another_adapter_is_another_run(tmp_path, drawn):
    recipe = recipe_of(tmp_path, drawn / "lora")
    recipe.output_dir.mkdir()
    save_recipe(recipe, recipe.output_dir / "recipe.yaml")
    (recipe.output_dir / "checkpoint-1").mkdir()
    copy = shutil.copytree(drawn / "lora", tmp_path / "copy")
    with pytest.raises(UserError, match="holds another run, made with other values of adapter"):
        runs.find_finished(recipe_of(tmp_path, copy))
    assert runs.find_finished(recipe) is None
    (recipe.output_dir / "train_metrics.json").write_text(
        json.dumps({"adapter_fingerprint": "0123", "global_step": 4, "budget": runs.budget(recipe), "result_files": {}})
    )
    with pytest.raises(UserError, match="adapter: .* is not what this finished run has gone on from"):
        runs.find_finished(recipe)


def test_first_weights_that_are_not_drawn_are_said(tmp_path, drawn, capsys):
    check_adapter(recipe_of(tmp_path, drawn / "lora", "--init_lora_weights", "gaussian"))
    assert "init_lora_weights is not used: the weights begin as those of" in capsys.readouterr().err


def test_the_eval_loss_of_a_run_is_that_of_its_last_step_also_where_no_evaluation_falls_on_it(tmp_path):
    keys = (
        "--max_steps",
        3,
        "--eval_steps",
        2,
        "--max_samples",
        50,
        "--max_eval_samples",
        8,
        "--num_sample_answers",
        0,
    )
    done = script("--output_dir", tmp_path / "run", *keys, check=True)
    shown = dict(re.findall(r"step (\d+): eval loss ([\d.]+)", done.stderr))
    assert [*shown] == ["0", "2", "3"]
    assert json.loads(done.stdout.splitlines()[-1])["eval_loss"] == pytest.approx(float(shown["3"]), abs=1e-4)


def test_another_length_of_a_run_that_goes_on_is_said_as_its_learning_rate_follows_it(tmp_path, capsys):
    recipe = load_recipe(["--output_dir", str(tmp_path), "--max_steps", "20"], usage="")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    (tmp_path / "checkpoint-4").mkdir()
    shorter = load_recipe(["--output_dir", str(tmp_path), "--max_steps", "12"], usage="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carelm.training.checkpoints.newest_whole", lambda folder: folder / "checkpoint-4")
        for one in (shorter, shorter):
            runs.open_output(one, types.SimpleNamespace(device=None))
    said = capsys.readouterr().err
    assert (
        said.count("another length than before (max_steps was 20, is 12): the learning rate follows the new one") == 1
    )
