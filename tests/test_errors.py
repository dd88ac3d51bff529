"""What a user can mend is one clear line, exit status 2, no traceback of ours, and nothing written."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types

import pytest
from launching import PROJECT, launch, script
from safetensors.torch import load_file

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.training import runs

ROWS = [{"question": f"Where is order {i}?", "answer": f"Order {i} is on its way.", "kind": "order"} for i in range(40)]
RECIPE = {
    "model_name_or_path": "demo/base",
    "prompt_template": "{question}",
    "completion_template": "{answer}",
    "max_steps": 2,
    "global_batch_size": 4,
}


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_file(folder, **keys):
    path = folder / "shop.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in {**RECIPE, **keys}.items() if v is not None))
    return path


def only_error(done):
    """The one line of a refusal, without any traceback of ours."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert f'File "{PROJECT}/train' not in done.stderr and f'File "{PROJECT}/carelm' not in done.stderr
    return lines[0]


def refuse(folder, *arguments, **keys):
    """Runs a recipe that must be refused and returns its one line."""
    done = script("--config", recipe_file(folder, **keys), "--output_dir", folder / "out", *arguments)
    assert done.returncode == 2
    assert done.stdout.strip() == ""
    assert not (folder / "out").exists()
    return only_error(done)


@pytest.fixture
def rows(tmp_path):
    return str(write(tmp_path / "rows.jsonl"))


def test_unknown_key(tmp_path, rows):
    assert "unknown key 'lora_rank'; did you mean 'lora_r'?" in refuse(tmp_path, dataset_name=rows, lora_rank=4)


def test_missing_file(tmp_path):
    assert "there is no file, folder or glob" in refuse(tmp_path, dataset_name=str(tmp_path / "rows.jsonl"))


def test_missing_recipe(tmp_path):
    done = script("--config", tmp_path / "none.yaml")
    assert (
        done.returncode == 2 and "cannot be read" in done.stderr and len(done.stderr.splitlines()) == 1
    )  # no launcher


def test_row_that_is_not_json(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    assert "rows.jsonl:2: not JSON" in refuse(tmp_path, dataset_name=str(tmp_path / "rows.jsonl"))


def test_missing_column_names_those_that_are_there(tmp_path, rows):
    line = refuse(tmp_path, dataset_name=rows, completion_template="{response}")
    assert "completion_template" in line and "no column 'response' (there: answer, kind, question)" in line


def test_too_many_rows_without_an_answer(tmp_path):
    broken = [{**row, "answer": ""} if i < 8 else row for i, row in enumerate(ROWS)]
    line = refuse(tmp_path, dataset_name=str(write(tmp_path / "rows.jsonl", broken)))
    assert "8 of 40 rows" in line and "rows.jsonl:1" in line and "max_empty_share" in line


def test_every_label_masked(tmp_path, rows):
    """A template that writes no special token after an answer trains a model that cannot stop."""
    base = shutil.copytree(PROJECT / "demo/base", tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    line = refuse(tmp_path, dataset_name=rows, model_name_or_path=str(base))
    assert "chat_template_path" in line and "special token" in line


def test_nothing_left_after_filtering(tmp_path, rows):
    assert "row_filter" in refuse(tmp_path, dataset_name=rows, row_filter={"kind": "refund"})


def test_nothing_left_in_the_window(tmp_path, rows):
    assert "max_length: nothing is left" in refuse(tmp_path, dataset_name=rows, max_length=8)


def test_global_batch_that_does_not_divide_by_the_ranks(tmp_path, rows):
    done = launch("--config", recipe_file(tmp_path, dataset_name=rows, global_batch_size=5), "--output_dir", tmp_path / "out",
                  config_file=PROJECT / "accelerate_configs/cpu_zero2.yaml", check=False)  # fmt: skip
    line = only_error(done)
    assert "global_batch_size: 5 does not divide by 2 ranks; the nearest sizes are 4 or 6" in line
    assert done.returncode != 0 and not (tmp_path / "out").exists()


def test_micro_batch_that_does_not_divide_the_share(tmp_path, rows):
    line = refuse(tmp_path, dataset_name=rows, global_batch_size=12, per_device_train_batch_size=5)
    assert "the nearest sizes are 4 and 6" in line


def test_ranks_that_are_not_there(tmp_path, rows):
    """On a CPU accelerate starts one process where two were asked for, without a word."""
    done = launch("--config", recipe_file(tmp_path, dataset_name=rows), "--output_dir", tmp_path / "out", check=False,
                  config_file=write_accelerate(tmp_path))  # fmt: skip
    assert done.returncode != 0 and "error: num_processes: 2 ranks were asked for and 1 started" in done.stderr
    after = done.stderr.partition("error: ")[2].splitlines()[1]
    assert after == ("carelm: what follows, if anything, is the launcher's own report of this; one process needs none: python "
                     "train/sft.py ...")  # fmt: skip
    assert not (tmp_path / "out").exists()


def write_accelerate(folder):
    path = folder / "accelerate.yaml"
    path.write_text("distributed_type: 'NO'\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n")
    return path


def test_precision_that_the_hardware_lacks(tmp_path, rows):
    assert "a CPU does not train in fp16" in refuse(tmp_path, dataset_name=rows, precision="fp16")


def test_method_and_bits_that_exclude_each_other(tmp_path, rows):
    assert "method: full cannot train a base held in 4 bits" in refuse(
        tmp_path, dataset_name=rows, method="full", load_in_4bit=True
    )


def test_method_that_the_zero_stage_cannot_do(tmp_path, rows):
    recipe = recipe_file(tmp_path, dataset_name=rows, use_dora=True, load_in_4bit=True)
    done = launch("--config", recipe, "--output_dir", tmp_path / "out", check=False,
                  config_file=PROJECT / "accelerate_configs/cpu_zero3.yaml")  # fmt: skip
    line = only_error(done)
    assert done.returncode != 0 and "use_dora" in line and "zero2.yaml" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, rows):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    done = script("--config", recipe_file(tmp_path, dataset_name=rows), "--output_dir", tmp_path / "mine")
    assert done.returncode == 2 and "holds no run of CareLM, but files (thesis.txt)" in done.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two steps, in a folder whose earlier run had ended before it saved anything."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "out/runs").mkdir(parents=True)
    (folder / "out/recipe.yaml").write_text("learning_rate: 7.0\n")
    rows = str(write(folder / "rows.jsonl"))
    recipe = recipe_file(folder, dataset_name=rows, save_strategy="steps", save_steps=1, num_sample_answers=0,
                         eval_strategy="steps", eval_steps=1, validation_fraction=0.3)  # fmt: skip
    done = script("--config", recipe, "--output_dir", folder / "out", CARELM_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_that_never_saved_does_not_block_its_folder(finished):
    _, done = finished
    assert "ended before its first checkpoint; it begins anew" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["global_step"] == 2


def test_a_second_start_at_once_is_told_of_the_first_one_and_not_that_it_begins_anew(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 7.0\n")
    recipe = load_recipe(["--output_dir", str(tmp_path)], usage="")
    code = f"import fcntl, time; file = open({str(tmp_path / '.lock')!r}, 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); " \
           f"file.write('process 7 on {socket.gethostname()}'); file.flush(); print(flush=True); time.sleep(60)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as first:
        try:
            first.stdout.readline()
            assert runs.find_finished(recipe) is None
            with pytest.raises(UserError, match="is in use by process 7 on"):
                runs.open_output(recipe, types.SimpleNamespace(device=None))
        finally:
            first.kill()
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_in_use_or_cannot_be_written_is_said_before_any_data_is_read(tmp_path, rows):
    (tmp_path / ".lock").write_text(f"process {os.getppid()} on {socket.gethostname()}\n")
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getppid()} on .*; wait for it, or set"):
        runs.check_free(tmp_path)
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")  # its own
    runs.check_free(tmp_path / "new" / "run")
    runs.check_free(tmp_path)
    assert not (tmp_path / "new").exists() and {p.name for p in tmp_path.iterdir()} == {".lock", "rows.jsonl"}
    done = script("--config", recipe_file(tmp_path, dataset_name=rows), "--output_dir", "/proc/nope")
    assert (
        done.returncode == 2 and done.stderr == "error: output_dir: /proc cannot be written; set another output_dir\n"
    )


def test_a_run_of_one_step_on_one_row_learns_and_says_what_little_it_learns(tmp_path):
    """A share of warmup rounds up to a whole step, whose learning rate is 0."""
    rows = str(write(tmp_path / "rows.jsonl", ROWS[:1]))
    recipe = recipe_file(tmp_path, dataset_name=rows, max_steps=1, validation_fraction=0, test_fraction=0)
    done = script("--config", recipe, "--output_dir", tmp_path / "out", "--num_sample_answers", 0, check=True)
    assert "carelm: 1 training example only: what is learnt is little more than their text" in done.stderr
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)  # they begin as zeros


def test_a_full_disk_in_an_evaluation_has_words_of_its_own():
    lines = "import runpy, carelm.recipe_file; " \
            "carelm.recipe_file.load_recipe = lambda *_, **__: open('/dev/full', 'w').write('x' * 2**20); " \
            "runpy.run_path('eval/run.py', run_name='__main__')"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", lines], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "checkpoint" not in done.stderr
    assert (
        "the disk is full ([Errno 28] No space left on device); the answers so far stay and are not made"
        in only_error(done)
    )


def test_a_finished_run_ends_with_the_next_three_commands_which_are_about_it(finished):
    folder, done = finished
    last = [line.split() for line in done.stderr.splitlines()[-3:]]
    assert [line[:4] for line in last] == [
        ["carelm:", "next:", "python", file] for file in ("eval/run.py", "train/chat.py", "serve/run.py")
    ]
    for line in last:
        recipe = load_recipe(line[4:], usage="", first=("models",))
        assert recipe.output_dir == folder / "out" and recipe.dataset_name == str(folder / "rows.jsonl")


def test_losses_are_shown_with_four_decimals_and_written_in_full(finished):
    _, done = finished
    metrics = json.loads(done.stdout.splitlines()[-1])
    shown = re.search(r", eval loss (.*)$", done.stderr, re.M).group(1)
    assert shown.split(" -> ")[-1] == f"{metrics['eval_loss']:.4f}" and "None" not in shown
    assert metrics["eval_loss"] != round(metrics["eval_loss"], 4)


def test_a_run_without_validation_rows_is_told_what_it_misses(tmp_path, rows):
    done = script("--config", recipe_file(tmp_path, dataset_name=rows, validation_fraction=0, precision="fp16"))
    assert done.returncode == 2 and "no validation rows" in done.stderr and "(validation_fraction)" in done.stderr


def test_another_run_in_the_folder_and_restart(finished, tmp_path):
    recipe = finished[0] / "shop.yaml"
    out = shutil.copytree(finished[0] / "out", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    done = script("--config", recipe, "--output_dir", out, "--learning_rate", "5e-4")
    assert done.returncode == 2
    assert "learning_rate (was 0.0002, is 0.0005)" in done.stderr and "--restart" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    done = script("--config", recipe, "--output_dir", out, "--learning_rate", "5e-4", "--restart")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["global_step"] == 2
    assert (tmp_path / "out.old-1/train_metrics.json").exists()
    for again, expected in enumerate(("the earlier run is kept as", "nothing to do")):  # a job that SLURM starts twice
        done = script(
            "--config", recipe, "--output_dir", out, "--restart", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(again)
        )
        assert done.returncode == 0 and expected in done.stderr, done.stderr
    assert not (tmp_path / "out.old-3").exists()


def test_no_whole_checkpoint(finished, tmp_path):
    out = shutil.copytree(finished[0] / "out", tmp_path / "out")
    (out / "train_metrics.json").unlink()
    for checkpoint in out.glob("checkpoint-*"):
        with open(checkpoint / "training_state.safetensors", "r+b") as file:
            file.truncate(100)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    done = script("--config", finished[0] / "shop.yaml", "--output_dir", out)
    line = only_error(done)
    assert done.returncode == 2 and "none of the 2 checkpoints" in line and "--restart" in line
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_pickled_weights(tmp_path, rows):
    base = shutil.copytree(PROJECT / "demo/base", tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "model_name_or_path" in refuse(tmp_path, dataset_name=rows, model_name_or_path=str(base))


def test_lora_on_modules_that_are_not_there(tmp_path, rows):
    assert "lora_target_modules" in refuse(tmp_path, dataset_name=rows, lora_target_modules=["query_key_value"])
