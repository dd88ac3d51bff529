"""An exported folder is served by vLLM and imported by Ollama with the prompts, stop tokens and drawing of the evaluation."""

import contextlib
import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import httpx
import pytest
from conftest import PROJECT
from drawn import make_adapter

from carelm.chat.chat import Chat
from carelm.chat.template import settle
from carelm.errors import UserError
from carelm.serving import vllm_command
from carelm.serving.go_template import Untold, conversation, render, tell
from carelm.serving.modelfile import why_not_imported

LLAMA = ["<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
TEMPLATES = {  # of tests/chat/templates, and the tokens that are special
    "llama-3.2": LLAMA,
    "qwen-3": CHATML,
    "gemma-3": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]"],
    "phi-4": [*CHATML, "<|im_sep|>"],
    "smollm": CHATML,
}
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
COUNTS = (
    "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length + 1 }} assistant: {% endif %}"
)
DROPS = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_with(tokenizer, template, special=()):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": [*special]})
    own.chat_template = settle(template, "the template")
    return Chat(own, max_length=512)


@pytest.fixture
def export(monkeypatch, capfd, tmp_path):
    """Runs train/export.py in this process: what its last line says, and what it says to people."""

    def export(*words, to=tmp_path / "exported"):
        monkeypatch.setattr(sys, "argv", ["train/export.py", "--output_dir", str(to), *map(str, words)])
        spec = importlib.util.spec_from_file_location("export_file", PROJECT / "train/export.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        out, said = capfd.readouterr()
        return json.loads(out.splitlines()[-1]), said

    return export


# The template in Go's language


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("system", [None, "You sell shoes."])
def test_a_template_told_in_gos_language_writes_the_ids_that_training_has(tokenizer, name, turns, system):
    text = (PROJECT / f"tests/chat/templates/{name}.jinja").read_text(encoding="utf-8")
    chat = chat_with(tokenizer, text, TEMPLATES[name])
    messages = conversation(turns, system)
    written = render(tell(chat, adds_bos=False), messages)
    assert chat.tokenizer(written, add_special_tokens=False)["input_ids"] == chat.prompt_ids(messages)


def test_the_first_token_is_left_out_where_the_one_who_renders_adds_it(tokenizer):
    chat, messages = Chat(tokenizer, max_length=512), conversation(2, "Be kind.")
    bos, without = tokenizer.bos_token, render(tell(chat, adds_bos=True), messages)
    assert bos + without == chat.text(messages, for_answer=True)
    with pytest.raises(Untold, match="in front of every prompt"):
        tell(
            chat_with(tokenizer, COUNTS.replace("loop.index", "''").replace("messages | length + 1", "''")),
            adds_bos=True,
        )


def test_a_template_without_system_messages_is_told_without_them(tokenizer):
    template = tell(chat_with(tokenizer, NO_SYSTEM), adds_bos=False)
    assert "system" not in template.lower() and 'eq .Role "user"' in template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (COUNTS, "otherwise as the conversation goes on"),
        (DROPS, "each message once"),
        (NO_SYSTEM.replace("assistant: ", "{{ '{{' }}"), "double braces"),
        (NO_SYSTEM.replace("assistant: ", "\u00a0"), "does not keep"),
    ],
)
def test_a_template_that_go_cannot_tell_is_refused_with_the_reason(tokenizer, template, reason):
    with pytest.raises(Untold, match=reason):
        tell(chat_with(tokenizer, template), adds_bos=False)


# The folder


def test_a_whole_model_is_exported_with_its_template_stop_tokens_and_greedy_drawing(export, base, tmp_path):
    result, said = export("--config", PROJECT / "recipes/demo.yaml", "--model", base)
    folder = tmp_path / "exported"
    assert result == {"folder": str(folder), "model": "base", "modelfile": True}
    assert os.path.samefile(folder / "model.safetensors", base / "model.safetensors")
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["temperature"] == 0 and config["do_sample"] is False and config["max_new_tokens"] == 64
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == config["eos_token_id"] and tokenizer.chat_template
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    template = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.M | re.S)[1]
    messages = conversation(3, None)
    assert render(template, messages) == Chat(tokenizer, max_length=512).text(messages, for_answer=True)
    lines = modelfile.splitlines()
    assert lines[0] == "FROM ." and {"PARAMETER temperature 0", "PARAMETER repeat_penalty 1", "PARAMETER num_ctx 448",
                                     "PARAMETER num_predict 64"} < {*lines}  # fmt: skip
    stops = [line.split('"')[1] for line in lines if line.startswith("PARAMETER stop")]
    assert tokenizer.convert_tokens_to_ids(stops) == config["eos_token_id"]
    # numbers of one and two digits are words in the demo's
    assert "Ollama: not from these files: it does not know how this tokenizer parts text" in said
    assert f"then: ollama create demo -f {folder}/Modelfile" in said and said.count("ollama create") == 1


def test_a_fixed_system_prompt_and_drawn_answers_go_into_the_modelfile(export, base, tmp_path):
    _, said = export("--config", PROJECT / "recipes/demo.yaml", "--model", base, "--system_prompt", "Be kind.",
                     "--temperature", "0.7", "--top_p", "0.9", "--prompt_template", "Ticket: {x}",
                     "--completion_template", "{y}", "--messages_column", "")  # fmt: skip
    modelfile = (tmp_path / "exported/Modelfile").read_text()
    assert 'SYSTEM """Be kind."""' in modelfile and "PARAMETER temperature 0.7\nPARAMETER top_p 0.9\n" in modelfile
    assert "system_prompt: clients" in said and "prompt_template: clients" in said


@contextlib.contextmanager
def started(folder, tmp_path, port="18473"):
    """The folder's script, with the server of the tests as vLLM."""
    program = tmp_path / "bin/vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {PROJECT / "tests/serving/vllm_server.py"} "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "VLLM_API_KEY": "key"}
    process = subprocess.Popen(["bash", folder / "vllm.sh", "--port", port], env=environment)
    try:
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.ConnectError):
                headers = {"Authorization": "Bearer key"}
                yield httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).json()["data"]
                return
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()


def test_an_adapter_is_exported_with_the_command_that_computes_it_on_its_base(export, base, tmp_path):
    recipe = make_adapter(tmp_path / "run", "--load_in_4bit", "false", "--lora_r", "12")
    result, said = export("--model", recipe.output_dir)
    folder = tmp_path / "exported"
    assert result["model"] == "adapter" and not result["modelfile"] and "merge it first" in said
    assert f"the base stays in {base}, as vllm.sh names it" in said
    script = (folder / "vllm.sh").read_text()
    assert f"vllm serve {base} --served-model-name base" in script
    assert "--enable-lora --max-lora-rank 16 --max-loras 1 --lora-modules adapter=adapter" in script
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with started(folder, tmp_path) as models:
        assert [model["id"] for model in models] == ["base", "adapter"]


def test_an_export_takes_the_place_of_an_earlier_one_or_leaves_it(export, tmp_path, monkeypatch):
    recipe = make_adapter(tmp_path / "run", "--load_in_4bit", "false")
    export("--model", recipe.output_dir)
    folder, earlier = tmp_path / "exported", tmp_path / "exported/of-the-earlier-one"
    earlier.touch()
    monkeypatch.setattr(vllm_command, "script", lambda words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export("--model", recipe.output_dir)
    assert earlier.exists() and (folder / "vllm.sh").exists()
    monkeypatch.undo()
    export("--model", recipe.output_dir)
    assert not earlier.exists() and (folder / "adapter/adapter_config.json").exists()
    (folder / "exported-F16.gguf").touch()
    with pytest.raises(UserError, match="^--output_dir: .*exported-F16.gguf would be lost"):
        export("--model", recipe.output_dir)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("exported")] == ["exported"]


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(export, tmp_path, monkeypatch):
    recipe = make_adapter(tmp_path / "run")
    with pytest.raises(
        UserError, match="^models: vLLM can serve none of them; merge it first"
    ):  # its base is in 4 bits
        export("--model", recipe.output_dir)
    with pytest.raises(UserError, match="^--model: .* belongs to no recipe.yaml"):
        export("--model", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^models: 'adapter': there is no folder outputs/demo; train first"):
        export()  # the demo's
    with pytest.raises(UserError, match="^--output_dir: .* is there already"):
        export("--model", recipe.output_dir, to=tmp_path)  # a folder of others stays
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("exported")]


# What Ollama's converter knows


@pytest.mark.parametrize(
    ("architecture", "steps", "reason"),
    [
        ("LlamaForCausalLM", [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}], None),
        ("Qwen3ForCausalLM", [{"type": "ByteLevel"}], "Qwen3ForCausalLM is none"),
        ("LlamaForCausalLM", [{"type": "Metaspace"}], "tokenizer.model"),
        ("LlamaForCausalLM", [{"type": "Digits"}, {"type": "ByteLevel"}], "parts text into words"),
        (
            "LlamaForCausalLM",
            [{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel"}],
            "parts text into words",
        ),
    ],
)
def test_what_ollama_would_read_otherwise_is_known(tmp_path, architecture, steps, reason):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    )
    found = why_not_imported(tmp_path)
    assert found is None if reason is None else reason in found
