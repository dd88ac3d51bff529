"""A merge is the adapter's own function within its tolerance, is whole or not there, and says how near it is."""

import functools
import io
import json
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from drawn import make_adapter
from launching import PROJECT, environment, script
from safetensors.torch import load_file, save_file

from carelm.errors import UserError
from carelm.evaluation import candidates
from carelm.models import merge
from carelm.recipe_file import load_recipe


def run_merge(*keys):
    """train/merge.py in this process, which has torch loaded already; what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["train/merge.py", *map(str, keys)])
        patch.chdir(PROJECT)
        runpy.run_path("train/merge.py", run_name="__main__")
    return subprocess.CompletedProcess(keys, 0, out.getvalue(), err.getvalue())


refused = functools.partial(script, file="train/merge.py")  # a refusal ends the process


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A drawn adapter on the 4-bit base, merged onto the weights that it computes with."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    make_adapter(folder)
    done = run_merge("--adapter", folder, "--output_dir", folder / "merged", "--num_prompts", 8)
    found = f"{json.loads(done.stdout.splitlines()[-1])['mean_kl']:.2g}"
    assert done.stderr.splitlines()[-5:-4] == [
        "carelm: check of the merge in fp32 against the adapter: passed. What decides is how far its probabilities of the next "
        f"token (a piece of a word) are from its adapter's: mean KL {found} on 8 test questions, at most "
        "1e-06 are allowed. It picks the same token every time, and all of the 8 whole answers are the same."
    ]
    saved = f"--config {folder}/recipe.yaml"  # three commands to paste
    assert done.stderr.splitlines()[-3:] == [
        f"carelm: next: python eval/run.py {saved}",
        f"carelm: next: python train/chat.py {saved} --models {folder}/merged",
        f"carelm: next: python serve/run.py {saved}",
    ]
    return folder, json.loads(done.stdout.strip().splitlines()[-1])


def test_onto_the_quantised_weights_in_fp32_it_is_the_adapter(merged):
    folder, certificate = merged
    assert certificate["onto"] == "quantized" and certificate["dtype"] == "fp32"
    assert certificate["mean_kl"] <= 1e-6 and certificate["top1_agreement"] == 1
    assert certificate["same_text_share"] == 1 and certificate["tokens"] > 100
    assert json.loads((folder / "merged/merge.json").read_text()) == certificate


def test_a_merge_is_a_plain_checkpoint_with_all_that_belongs_to_it(merged, base):
    folder, _ = merged
    there = {p.name for p in (folder / "merged").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= there
    assert "quantization_config" not in json.loads((folder / "merged/config.json").read_text())
    weights, original = (load_file(f / "model.safetensors") for f in (folder / "merged", base))
    assert weights.keys() == original.keys() and all(w.dtype == torch.float32 for w in weights.values())


def test_the_same_merge_again_says_so_and_another_is_not_put_over_it(merged):
    folder, certificate = merged
    again = run_merge("--adapter", folder, "--output_dir", folder / "merged")
    assert json.loads(again.stdout) == certificate and "holds this merge" in again.stderr
    other = refused("--adapter", folder, "--output_dir", folder / "merged", "--dtype", "bf16")
    assert other.returncode == 2 and "is there already" in other.stderr


def test_a_merge_of_an_earlier_adapter_is_refused_by_the_evaluator_and_kept_aside_by_the_next_merge(merged, tmp_path):
    folder, certificate = merged
    shutil.copytree(folder, tmp_path / "run")
    make_adapter(tmp_path / "run", "--lora_r", "8")
    recipe = load_recipe(["--output_dir", str(tmp_path / "run"), "--lora_r", "8"], usage="")
    with pytest.raises(UserError, match="was made of an earlier adapter"):
        candidates.find(recipe, "merged")
    done = run_merge("--adapter", tmp_path / "run", "--output_dir", tmp_path / "run/merged", "--num_prompts", 0)
    assert "merged.old-1" in done.stderr and "not known" in done.stderr
    assert json.loads((tmp_path / "run/merged.old-1/merge.json").read_text()) == certificate
    made = json.loads((tmp_path / "run/merged/merge.json").read_text())
    assert made["mean_kl"] is None and made["adapter"] != certificate["adapter"]
    assert candidates.find(recipe, "merged").name == "merged"
    stricter = refused("--adapter", tmp_path / "run", "--output_dir", tmp_path / "run/merged")
    assert stricter.returncode == 2 and "not within" in stricter.stderr


def test_fp16_is_certified_on_a_cpu(merged, tmp_path):
    folder, _ = merged
    done = run_merge("--adapter", folder, "--output_dir", tmp_path / "m", "--dtype", "fp16", "--num_prompts", 2)
    assert json.loads(done.stdout.strip().splitlines()[-1])["dtype"] == "fp16"


def test_beyond_its_tolerance_nothing_is_left_and_the_status_says_so(merged, tmp_path):
    folder, _ = merged
    done = refused("--adapter", folder, "--output_dir", tmp_path / "m", "--onto", "base", "--num_prompts", 2,
                   "--tolerance", 1e-9)  # fmt: skip
    assert done.returncode == 1 and "beyond its tolerance" in done.stderr
    assert not list(tmp_path.iterdir())


BF16 = ("--load_in_4bit", "false", "--precision", "bf16")


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """A drawn adapter so large that merged weights in bf16 lose too much of it."""
    folder = tmp_path_factory.mktemp("bf16") / "run"
    make_adapter(folder, *BF16, scale=0.3)
    return folder


def test_where_no_dtype_is_named_and_the_runs_own_bits_do_not_pass_it_is_merged_in_fp32_and_says_so(in_bf16, tmp_path):
    command = ("--adapter", in_bf16, "--output_dir", tmp_path / "m", "--num_prompts", 8, "--tolerance", 1e-4)
    done = run_merge(*command)
    made = json.loads((tmp_path / "m/merge.json").read_text())
    assert made["dtype"] == "fp32" and made["mean_kl"] <= made["tolerance"]
    assert all(w.dtype == torch.float32 for w in load_file(tmp_path / "m/model.safetensors").values())
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "float32"
    first, why, second = (line for line in done.stderr.splitlines() if "merge in " in line or "again in fp32" in line)
    assert "bf16 against the adapter: not passed" in first
    assert "more than the 0.0001 that are allowed" in first
    assert "twice the size, and checked in fp32 (--dtype bf16 would end here" in why
    assert "fp32 against the adapter: passed" in second
    assert "holds this merge; nothing to do" in run_merge(*command).stderr


def test_a_dtype_that_is_named_is_kept_and_fails_naming_the_one_that_is_nearer(in_bf16, tmp_path):
    done = refused("--adapter", in_bf16, "--output_dir", tmp_path / "m", "--num_prompts", 8, "--dtype", "bf16",
                   "--tolerance", 1e-4)  # fmt: skip
    assert done.returncode == 1 and "--dtype fp32 is nearer and worth trying" in done.stderr
    assert "again in fp32" not in done.stderr and not list(tmp_path.iterdir())


def weights_of(folder, tmp_path, recipe, onto, dtype="fp32"):
    merge.merge_weights(candidates.find(recipe, "adapter").recipe, folder, tmp_path, onto, dtype)
    return load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("keys", [("--use_dora", "true"), ("--use_rslora", "true")], ids=str)
def test_every_kind_of_lora_gives_what_peft_itself_merges(tmp_path, keys):
    recipe = make_adapter(tmp_path / "run", "--load_in_4bit", "false", "--precision", "fp32", *keys)
    candidate = candidates.find(recipe, "adapter")
    ours = weights_of(tmp_path / "run", tmp_path / "merged", recipe, "base")
    model, _ = candidate.load(candidate.make_chat())
    theirs = model.merge_and_unload().state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    changed = candidates.find(recipe, "base").load(candidate.make_chat())[0].state_dict()
    assert not torch.allclose(
        ours["model.layers.0.mlp.up_proj.weight"], changed["model.layers.0.mlp.up_proj.weight"], atol=1e-3
    )


def test_an_eight_bit_base_is_merged_onto_what_it_computes_with(tmp_path):
    make_adapter(tmp_path / "run", "--load_in_4bit", "false", "--load_in_8bit", "true")
    done = run_merge("--adapter", tmp_path / "run", "--output_dir", tmp_path / "m", "--num_prompts", 4)
    onto_quantized = json.loads(done.stdout.strip().splitlines()[-1])
    done = run_merge("--adapter", tmp_path / "run", "--output_dir", tmp_path / "b", "--num_prompts", 4, "--tolerance", 1,
                     "--onto", "base")  # fmt: skip
    assert onto_quantized["onto"] == "quantized" and onto_quantized["mean_kl"] <= onto_quantized["tolerance"] < 0.02
    assert onto_quantized["mean_kl"] <= 1.2 * json.loads(done.stdout.strip().splitlines()[-1])["mean_kl"]


def test_a_base_in_shards_gives_the_same_weights_in_the_same_shards(merged, base, tmp_path):
    folder, _ = merged
    parts = load_file(base / "model.safetensors")
    names = sorted(parts)
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    index = {}
    for k, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{k:05}-of-00002.safetensors"
        save_file({n: parts[n] for n in chosen}, tmp_path / "base" / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    recipe = load_recipe(["--output_dir", str(folder), "--model_name_or_path", str(tmp_path / "base")], usage="")
    recipe.precision = "fp32"
    merge.merge_weights(recipe, folder, tmp_path / "merged", "quantized", "fp32")
    whole = load_file(folder / "merged/model.safetensors")
    shards = [load_file(tmp_path / "merged" / f) for f in sorted(set(index.values()))]
    assert all(torch.equal(shard[name], whole[name]) for shard in shards for name in shard)
    assert json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())["weight_map"] == index


def test_a_killed_merge_leaves_no_folder_that_looks_whole(merged, tmp_path):
    folder, _ = merged
    target = tmp_path / "m"
    process = subprocess.Popen(
        [sys.executable, "train/merge.py", "--adapter", folder, "--output_dir", target],
        cwd=PROJECT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    aside = tmp_path / "m.partial"
    while not (aside / "model.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not target.exists() and not (aside / "merge.json").exists()
    run_merge("--adapter", folder, "--output_dir", target, "--num_prompts", 2)
    assert (target / "merge.json").exists() and not aside.exists()


def test_prompt_tuning_has_nothing_to_merge(tmp_path):
    make_adapter(tmp_path / "run", "--method", "prompt_tuning")
    done = refused("--adapter", tmp_path / "run", "--output_dir", tmp_path / "m")
    assert done.returncode == 2 and "is a trained prompt" in done.stderr and not (tmp_path / "m").exists()


def test_onto_quantized_needs_a_quantised_base(tmp_path):
    make_adapter(tmp_path / "run", "--load_in_4bit", "false")
    done = refused("--adapter", tmp_path / "run", "--output_dir", tmp_path / "m", "--onto", "quantized")
    assert done.returncode == 2 and "use --onto base" in done.stderr


def test_an_adapter_of_another_base_is_refused(tmp_path):
    recipe = make_adapter(tmp_path / "run", "--load_in_4bit", "false")
    file = tmp_path / "run/adapter_model.safetensors"
    save_file({n.replace("layers.3.", "layers.9."): t for n, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match="belongs to another base"):
        weights_of(tmp_path / "run", tmp_path / "merged", recipe, "base")


SMALL_DISK = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
runpy.run_path("train/merge.py", run_name="__main__")
"""


def test_a_disk_without_room_is_one_line_and_nothing_is_left(merged, tmp_path):
    folder, _ = merged
    (tmp_path / "merge.py").write_text(SMALL_DISK)
    done = script("--adapter", folder, "--output_dir", tmp_path / "m", "--num_prompts", 0, file=tmp_path / "merge.py")
    assert (
        done.returncode == 2 and "is not made, nothing of it is left" in done.stderr and "Traceback" not in done.stderr
    )
    assert {p.name for p in tmp_path.iterdir()} == {"merge.py"}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "train_metrics.json"])
def test_a_run_whose_file_is_damaged_is_named_by_the_evaluator_too(merged, tmp_path, file):
    folder, _ = merged
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    torn = tmp_path / "run" / file
    torn.write_bytes(torn.read_bytes()[:-9] if torn.exists() else b'{"train')
    recipe = load_recipe(["--output_dir", str(tmp_path / "run")], usage="")
    with pytest.raises(UserError, match=f"{file} is damaged"):
        candidates.find(recipe, "adapter").check_base()


def test_an_adapter_with_nan_is_named_before_anything_is_merged(merged, tmp_path, monkeypatch):
    folder, _ = merged
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    file = tmp_path / "run/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    words = ["--adapter", str(tmp_path / "run"), "--output_dir", str(tmp_path / "m"), "--num_prompts", "0"]
    monkeypatch.setattr(sys, "argv", ["train/merge.py", *words])
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UserError, match="^--adapter: adapter .*run holds NaN in 1 of"):
        runpy.run_path("train/merge.py")["main"]()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("name", "value", "dtype", "line"),
    [
        ("model.norm.weight", torch.nan, "fp32", "model_name_or_path: .*base holds NaN or infinity in model.norm.weight"),
        ("model.layers.1.mlp.up_proj.weight", torch.inf, "fp32", "model_name_or_path: .* in model.layers.1.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj.weight", 1e5, "fp16", "--dtype: model.layers.1.mlp.up_proj.weight .* too large for fp16"),
    ],
)  # fmt: skip
def test_weights_that_are_not_finite_are_named(merged, base, tmp_path, name, value, dtype, line):
    folder, _ = merged
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    recipe = load_recipe(["--output_dir", str(folder), "--model_name_or_path", str(tmp_path / "base")], usage="")
    with pytest.raises(UserError, match=line):
        weights_of(folder, tmp_path / "m", recipe, "base", dtype)


def test_a_merged_checkpoint_ends_its_answers_where_the_run_would(merged, base, tmp_path, capsys):
    """A checkpoint has no generation config, and that of its base may be invalid, and knows no end of turn."""
    folder, _ = merged
    shutil.copytree(base, tmp_path / "base")
    invalid = {"eos_token_id": 1, "temperature": 0.6, "do_sample": False}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(invalid))
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("merged", "generation_config.json"))
    recipe = load_recipe(["--output_dir", str(folder), "--model_name_or_path", str(tmp_path / "base")], usage="")
    chat = candidates.find(recipe, "adapter").make_chat()
    (tmp_path / "m").mkdir()
    merge.save_beside(recipe, tmp_path / "run", chat, tmp_path / "m")
    written = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert written["eos_token_id"] == sorted({1, chat.end_of_turn_id}) and "temperature" not in written
    assert "left out of it: temperature 0.6" in capsys.readouterr().err


def test_a_full_fine_tune_is_a_whole_model_already(base, tmp_path):
    done = refused("--adapter", base, "--output_dir", tmp_path / "m")
    assert done.returncode == 2 and "is a whole model already" in done.stderr and not (tmp_path / "m").exists()
