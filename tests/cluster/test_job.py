"""What a job keeps for its later starts: a copy of its code and recipes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PROJECT

from carelm.cluster import job
from carelm.errors import UserError
from carelm.provenance import git_commit


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Makes a job's copy, as the start of this number does."""

    def keep(number: str, *words: str, start: int = 1) -> Path:
        monkeypatch.setenv("SLURM_JOB_ID", number)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start - 1))
        return job.keep(list(words), tmp_path / "out", tmp_path / f"slurm-{number}.code")

    return keep


def words_of(copy: Path) -> list[str]:
    return (copy / "WORDS").read_text().split("\0")[:-1]


def ask(copy: Path, *words, cwd: Path) -> str:
    """The job's Python, as a batch script starts it: the copy wins over an environment made for another one."""
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{PROJECT}"}
    done = subprocess.run([sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_recipe_that_is_named_is_copied_under_its_own_name(keep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "theirs"):
        Path(folder).mkdir()
        Path(folder, "shop.yaml").write_text(f"seed: {len(folder)}\n")
    copy = keep("7", "--config", "mine/shop.yaml", "recipes/demo.yaml", "--seed", "1", "--config=theirs/shop.yaml")
    shutil.rmtree("mine")
    _, mine, demo, *others, theirs = words_of(copy)
    assert others == ["--seed", "1", "--config"] and Path(mine).name == Path(theirs).name == "shop.yaml"
    texts = [Path(file).read_text() for file in (mine, demo, theirs)]
    assert texts == ["seed: 4\n", (PROJECT / "recipes/demo.yaml").read_text(), "seed: 6\n"]
    assert all(Path(file).is_relative_to(copy) for file in (mine, demo, theirs))


def test_data_that_lies_beside_a_recipe_is_found_from_the_recipes_copy_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("shop").mkdir()
    Path("shop/rows.csv").write_text("question,answer\nWhere?,There.\n")
    Path("shop/shop.yaml").write_text(
        'dataset_name: rows.csv\nprompt_template: "{question}"\ncompletion_template: "{answer}"\n'
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for own in ([], ["--dataset_name", "demo/data"]):
        shutil.rmtree("outputs", ignore_errors=True)
        monkeypatch.setattr("sys.argv", ["job", "keep", "1", "job.code", "--config", "shop/shop.yaml", *own])
        job.main()
        words = words_of(Path(capsys.readouterr().out.strip()))
        assert words[2:] == (own or ["--dataset_name", str(tmp_path / "shop/rows.csv")])


def test_the_copy_is_whole_and_says_what_it_is_of(keep, tmp_path):
    copy = keep("7", "--config", "recipes/demo.yaml")
    assert copy == tmp_path / "out/.code/7" == (tmp_path / "slurm-7.code").resolve()
    for place in ("carelm/cluster/job.py", "train/sft.py", "eval/run.py", "slurm/job.sh", "demo/data/train.jsonl",
                  "ds_configs/zero2.json", "accelerate_configs/nodes_zero2.yaml", "recipes/demo.yaml"):  # fmt: skip
        assert (copy / place).read_bytes() == (PROJECT / place).read_bytes()
    assert (copy / "COMMIT").read_text() == f"{git_commit() or ''}\n"
    code = "from carelm import files, provenance; print(files.__file__, provenance.git_commit(), files.locate('demo/data'))"
    assert ask(copy, "-c", code, cwd=PROJECT) == f"{copy}/carelm/files.py {git_commit()} {copy}/demo/data"


def test_names_lead_where_they_did_less_what_the_job_has_a_copy_of(keep, tmp_path):
    copy = keep("7", "--config", "recipes/demo.yaml")
    here = tmp_path / "here"
    shutil.copytree(PROJECT / "recipes", here / "recipes")
    for name, cwd, leads_to in (
        ("accelerate_configs/cpu_zero2.yaml", PROJECT, copy / "accelerate_configs/cpu_zero2.yaml"),
        (str(PROJECT / "train/../ds_configs/zero2.json"), here, copy / "ds_configs/zero2.json"),
        ("demo/data", here, copy / "demo/data"),
        ("recipes/datasets/sgd.yaml", here, here / "recipes/datasets/sgd.yaml"),  # the user's own, as seen from there
        ("demo/base", PROJECT, PROJECT / "demo/base"),  # not copied: a result names it
        ("demo/base", here, PROJECT / "demo/base"),
        ("benchmarks", here, PROJECT / "benchmarks"),
        ("nowhere.csv", here, "nowhere.csv"),
    ):
        assert ask(copy, "-m", "carelm.cluster.job", "locate", name, cwd=cwd) == str(leads_to)


def test_jobs_with_one_parent_and_tasks_of_an_array_have_one_each_and_a_later_start_finds_its_own(keep, tmp_path):
    first, second = (keep(number, "--config", "recipes/demo.yaml", "--seed", number) for number in ("7", "8"))
    assert [words_of(copy)[-1] for copy in (first, second)] == ["7", "8"]
    assert words_of(keep("7", "--config", "gone.yaml", start=2))[-1] == "7"  # its link was lost
    assert words_of(keep("7", "--config", "recipes/demo.yaml", "--seed", "9"))[-1] == "9"  # another job of this number
    assert sorted(p.name for p in (tmp_path / "out/.code").iterdir()) == ["7", "8"]


def test_a_copy_that_was_torn_is_made_again(keep, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as while_copying, pytest.raises(KeyboardInterrupt):
        while_copying.setattr(job, "_keep_recipes", kill)
        keep("7", "--config", "recipes/demo.yaml")
    copy = keep("7", "--config", "recipes/demo.yaml", start=2)
    assert (copy / "slurm/job.sh").exists() and [p.name for p in copy.parent.iterdir()] == ["7"]


def test_a_folder_that_takes_no_copy_is_named(keep, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        UserError, match=r"^output_dir: .*out.* cannot be written \(.*; set output_dir, or sbatch --output"
    ):
        keep("7", "--config", "recipes/demo.yaml")


def test_overlays_reach_the_check_of_a_job(monkeypatch, capsys):
    files = ["--config", "recipes/datasets/sgd.yaml", "--config", "recipes/overlays/demo_base.yaml"]
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["job", "check", "2", *files, "--seed", "7"])
    job.main()
    assert capsys.readouterr().out == f"{PROJECT / 'outputs/sgd+demo_base'}\n"
