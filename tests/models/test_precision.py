"""`precision: auto` on a CPU: measured once for a run, and never again."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from launching import copies

from carelm import ranks
from carelm.errors import UserError
from carelm.evaluation import candidates
from carelm.models import precision
from carelm.models.precision import choose_precision
from carelm.recipe_file import load_recipe, save_recipe
from carelm.training import runs


def machine_makes(monkeypatch, fp32: float, bf16: float) -> None:
    """FLOP/s as another machine, or this one when it is busy, would have them."""
    rates = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(precision, "matmul_ceiling", lambda device, dtype, seconds: rates[dtype])


def begin(run):
    """What a first start chooses and keeps."""
    chosen = choose_precision("auto", run)
    chosen.keep(run)
    return chosen.name


@pytest.mark.parametrize("fp32, bf16, chosen", [(2e11, 8e11, "bf16"), (2e11, 4e11, "bf16"), (2e11, 3.9e11, "fp32"),
                                                (2e11, 1e11, "fp32")])  # fmt: skip
def test_bf16_is_taken_where_its_products_are_twice_as_fast(tmp_path, monkeypatch, fp32, bf16, chosen):
    machine_makes(monkeypatch, fp32, bf16)
    assert begin(tmp_path / "run") == chosen
    assert json.loads((tmp_path / "run/precision.json").read_text())["matmul_flops"] == {"fp32": fp32, "bf16": bf16}


def test_a_later_start_takes_what_the_first_one_has_measured_and_says_why(tmp_path, monkeypatch):
    machine_makes(monkeypatch, 2e11, 8.6e11)
    begin(tmp_path)
    machine_makes(monkeypatch, 2e11, 1e11)
    again = choose_precision("auto", tmp_path)
    assert again.name == "bf16" and again.note is None
    assert "bf16 products were 4.3 times as fast as fp32's on the CPU of the first start" in again.reason
    assert str(tmp_path / "precision.json") in again.reason
    assert choose_precision("auto", tmp_path, anew=True).name == "fp32"


@pytest.mark.parametrize("left", ["checkpoint-6", "adapter_model.safetensors"])
def test_a_run_that_an_older_version_began_goes_on_in_fp32(tmp_path, monkeypatch, left):
    machine_makes(monkeypatch, 2e11, 8e11)
    (tmp_path / left).mkdir()
    chosen = choose_precision("auto", tmp_path)
    assert (chosen.name, chosen.note) == ("fp32", None) and "was begun without a precision.json" in chosen.reason


def test_a_named_precision_needs_no_note_and_wins_over_it(tmp_path, monkeypatch):
    machine_makes(monkeypatch, 2e11, 8e11)
    for name in ("fp32", "bf16"):
        choose_precision(name, tmp_path).keep(tmp_path)
    assert not list(tmp_path.iterdir())
    assert begin(tmp_path) == "bf16" and choose_precision("fp32", tmp_path).name == "fp32"


def test_a_note_of_a_cpu_does_not_bind_a_gpu(tmp_path, monkeypatch):
    machine_makes(monkeypatch, 2e11, 1e11)
    assert begin(tmp_path) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert choose_precision("auto", tmp_path).name == "bf16"


@pytest.mark.parametrize("text", ["{", '{"precision": "int4"}', '{"precision": "fp32"}'])
def test_a_damaged_note_is_one_line(tmp_path, text):
    (tmp_path / "precision.json").write_text(text)
    with pytest.raises(UserError, match=r"precision.json .*remove it"):
        choose_precision("auto", tmp_path)


def test_this_machine_is_measured_when_nothing_is_kept(tmp_path):
    """Whatever it is: the choice follows from the figures that stand in the note."""
    name = begin(tmp_path)
    flops = json.loads((tmp_path / "precision.json").read_text())["matmul_flops"]
    assert name == ("bf16" if flops["bf16"] >= 2 * flops["fp32"] else "fp32") and 1e8 < flops["fp32"] < 1e14


def test_a_note_claims_no_folder_and_ends_with_a_run_that_begins_anew(tmp_path, monkeypatch):
    """An evaluation may have written it before there was a run, or a start that ended before its first checkpoint."""
    machine_makes(monkeypatch, 2e11, 8e11)
    recipe = load_recipe(["--output_dir", str(tmp_path), "--precision", "auto"], usage="")
    begin(tmp_path)
    assert runs.find_finished(recipe) is None
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert runs.find_finished(recipe) is None
    recipe.restart = True
    assert runs.restarts(recipe) and choose_precision("auto", tmp_path, anew=runs.restarts(recipe)).note


def test_a_model_of_a_comparison_is_measured_once_whoever_asks(tmp_path, monkeypatch):
    recipe = load_recipe(["--output_dir", str(tmp_path / "run"), "--precision", "auto"], usage="")
    machine_makes(monkeypatch, 2e11, 8e11)
    base = candidates.find(recipe, "base")
    assert base.precision().name == "bf16"
    machine_makes(monkeypatch, 2e11, 1e11)
    assert base.precision().name == candidates.find(recipe, "base").precision().name == "bf16"
    assert candidates.find(recipe, "base@fp32").precision().name == "fp32"


def _rank(number: int, port: int, folder: str) -> None:
    """One of two ranks on machines that would choose differently, without a folder that both see."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        machine_makes(patch, 2e11, 1e11 if number else 8e11)
        ranks.join(60)
        run = Path(folder, f"node-{number}")
        chosen = choose_precision("auto", run)
        chosen.keep(run)
        Path(folder, f"rank-{number}").write_text(chosen.name)
        ranks.leave()


def test_all_ranks_take_the_choice_of_the_first(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [copies.Process(target=_rank, args=(number, port, str(tmp_path))) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert [(tmp_path / f"rank-{number}").read_text() for number in range(2)] == ["bf16", "bf16"]
    assert not (tmp_path / "node-1").exists()
