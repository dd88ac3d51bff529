"""The evaluator: the same answers whatever the batch and the ranks, nothing answered twice, figures where they belong."""

import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from drawn import make_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import PROJECT, environment, launch, script
from safetensors.torch import load_file, save_file

from carelm.chat.chat import make_chat
from carelm.data import splits
from carelm.errors import UserError
from carelm.evaluation import answers, candidates, pace
from carelm.evaluation.predictions import PredictionFile
from carelm.evaluation.questions import make_questions
from carelm.models import generation
from carelm.models.base import base_fingerprint
from carelm.models.generation import Decoding
from carelm.next_steps import chat_words
from carelm.recipe_file import load_recipe
from carelm.training import runs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts():
    recipe = load_recipe(["--max_eval_samples", "12"], usage="")
    chat = make_chat(recipe)
    return [chat.prompt_ids(question.messages) for question in make_questions(recipe, chat)[0]]


def answer_all(model, chat, prompts, max_batch_tokens, decoding):
    answers = [None] * len(prompts)
    generation.generate_all(
        model, chat, prompts, decoding, device=CPU, max_batch_tokens=max_batch_tokens, done=answers.__setitem__
    )
    return answers


@pytest.mark.parametrize("keys", [(), ("--load_in_4bit", "false"), ("--method", "prompt_tuning")], ids=str)
def test_answers_do_not_depend_on_the_batch(tmp_path, prompts, keys):
    recipe = make_adapter(tmp_path / "run", *keys)
    candidate = candidates.find(recipe, "adapter")
    chat = candidate.make_chat()
    model, _ = candidate.load(chat)
    decoding = Decoding(16)
    alone = answer_all(model, chat, prompts, 1, decoding)
    for max_batch_tokens in (400, 1000, 10**6):
        assert answer_all(model, chat, prompts, max_batch_tokens, decoding) == alone
    # with prompt tuning PEFT's own generate is the reference where nothing is padded
    own = model.generate(input_ids=torch.tensor([prompts[0]]), max_new_tokens=16, do_sample=False)
    own = own[0, len(prompts[0]) :] if own.shape[1] > 16 else own[0]
    assert chat.tokenizer.decode(own, skip_special_tokens=True).strip() == alone[0].text


@pytest.fixture(scope="module")
def base_model(base):
    recipe = load_recipe(["--load_in_4bit", "false"], usage="")
    candidate = candidates.find(recipe, "base")
    chat = candidate.make_chat()
    return candidate.load(chat)[0], chat


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), budget=st.integers(1, 600))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("through", ["the batcher", "generate"])
def test_every_prompt_is_answered_once_and_no_batch_is_over_the_budget(
    base_model, monkeypatch, through, lengths, budget
):
    model, chat = base_model
    done, prompts = [], [[5] * n for n in lengths]
    with monkeypatch.context() as patch, watched(model) as forwards:
        if through == "generate":
            patch.setattr(generation, "why_not", lambda model: "a test")
        spent = generation.generate_all(
            model, chat, prompts, Decoding(3), device=CPU, max_batch_tokens=budget,
            done=lambda i, answer: done.append(i),
        )  # fmt: skip
    assert sorted(done) == list(range(len(lengths)))
    for rows, columns in forwards:
        assert rows == 1 or rows * columns <= budget
    assert spent["batch_size"] == max(rows for rows, columns in forwards) or through == "the batcher"


@contextmanager
def watched(model, most_rows=10**6):
    """The rows and the columns, with those that were there before, of every forward; as if more rows than `most_rows` did not
    fit in memory."""
    forwards = []

    def look(module, args, inputs):
        rows, new = inputs["input_ids"].shape
        if rows > most_rows:
            raise torch.OutOfMemoryError
        forwards.append((rows, inputs["past_key_values"].get_seq_length() + new))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield forwards
    finally:
        hook.remove()


@pytest.mark.parametrize("through", ["the batcher", "generate"])
def test_out_of_memory_halves_the_batch_says_so_and_loses_nothing(base_model, prompts, monkeypatch, capsys, through):
    """The real model under a limit of three rows, as a GPU would have it."""
    model, chat = base_model
    if through == "generate":
        monkeypatch.setattr(generation, "why_not", lambda model: "a test")
    whole = answer_all(model, chat, prompts, 10**6, Decoding(8))
    with watched(model, most_rows=3) as forwards:
        assert answer_all(model, chat, prompts, 10**6, Decoding(8)) == whole
    assert max(rows for rows, columns in forwards) == 3
    assert f"out of memory with a batch of {len(prompts)}; goes on with {len(prompts) // 2}" in capsys.readouterr().err


def test_generation_stops_at_every_end_token_and_says_why(base_model, prompts):
    model, chat = base_model
    first = generation.generate(model, chat, prompts[:1], Decoding(8), device=CPU)[0]
    assert first.finish_reason == "length" and first.new_tokens == 8
    stops = model.generation_config.eos_token_id
    assert len(stops) == 2
    third = model.generate(input_ids=torch.tensor(prompts[:1]), max_new_tokens=3, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [*stops, third]
    try:
        stopped = generation.generate(model, chat, prompts[:1], Decoding(8), device=CPU)[0]
    finally:
        model.generation_config.eos_token_id = stops
    assert stopped.finish_reason == "stop" and stopped.new_tokens <= 3


def test_drawn_answers_are_the_same_in_any_batch_and_through_generate(base_model, prompts):
    model, chat = base_model
    decoding = Decoding(12, temperature=1.0, top_p=0.95, seed=3)
    drawn = answer_all(model, chat, prompts, 400, decoding)
    assert answer_all(model, chat, prompts[3:], 10**6, decoding) == drawn[3:]
    assert generation.generate(model, chat, prompts, decoding, device=CPU) == drawn
    assert answer_all(model, chat, prompts, 400, Decoding(12)) != drawn


def test_latency_has_its_percentiles(base_model, prompts):
    model, chat = base_model
    found = generation.latency(model, chat, prompts[:5], Decoding(4), device=CPU, done=lambda: None)
    for times in found.values():
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
    assert found["e2e_ms"]["p50"] == pytest.approx(found["ttft_ms"]["p50"] + 3 * found["tpot_ms"]["p50"], rel=0.5)


# The questions


def test_the_prompt_of_a_question_is_the_prefix_that_was_trained():
    recipe = load_recipe(["--max_eval_samples", "20"], usage="")
    chat = make_chat(recipe)
    examples, _ = splits.make_examples(recipe)
    questions, _ = make_questions(recipe, chat)
    asked = {q.id: chat.prompt_ids(q.messages) for q in questions}
    rendered, _ = chat.render(examples["test"])
    number = 0
    for example, tokens in zip(examples["test"], rendered):
        starts = [i for i in range(1, len(tokens.trained)) if tokens.trained[i] and not tokens.trained[i - 1]]
        for k, start in enumerate(starts):
            ids = asked[example.id if len(starts) == 1 else f"{example.id}/{k + 1}"]
            assert ids == tokens.input_ids[:start].tolist()
            number += 1
    assert number == len(questions) > 20


def test_rows_of_one_ticket_are_one_conversation_of_several_questions(tmp_path):
    rows = [{"ticket": i // 2, "q": f"Question {i}?", "a": f"Answer {i}."} for i in range(8)]
    for name in ("train", "test"):
        changed = [{**row, "q": f"{name}: {row['q']}"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(
        f"dataset_name: {tmp_path}\nprompt_template: '{{q}}'\ncompletion_template: '{{a}}'\nid_column: ticket\n"
    )
    recipe = load_recipe(["--config", str(recipe_file)], usage="")
    questions, _ = make_questions(recipe, make_chat(recipe))
    assert len({q.id for q in questions}) == 8 and len({q.conversation for q in questions}) == 4


def test_a_label_may_be_written_as_people_write_it(tmp_path):
    """YAML 1.1 would make booleans of yes and no, and numbers of ratings."""
    columns = "dataset_name: x.csv\nprompt_template: '{q}'\ncompletion_template: '{a}'\n"
    (tmp_path / "r.yaml").write_text(columns + "labels: [yes, no, 3, true]\n")
    assert load_recipe(["--config", str(tmp_path / "r.yaml")], usage="").labels == ["yes", "no", "3", "true"]
    assert load_recipe(["--labels", "yes", "no"], usage="").labels == ["yes", "no"]


def test_shots_stand_in_front_come_from_train_and_are_the_same_for_all():
    recipe = load_recipe(["--max_eval_samples", "3", "--num_shots", "2", "--system_prompt", "Be kind."], usage="")
    chat = make_chat(recipe)
    questions, about = make_questions(recipe, chat)
    train = {m["content"] for e in splits.make_examples(recipe)[0]["train"] for m in e.prompt if m["role"] == "user"}
    shots = [q.messages[1:5] for q in questions]
    assert about["num_shots"] == 2 and questions[0].messages[0]["role"] == "system"
    assert all(s[:2] == shots[0][:2] for s in shots) and shots[0][0]["content"] in train
    assert [m["role"] for m in shots[0][:2]] == ["user", "assistant"]


def test_references_of_a_test_split_that_is_cut_from_train(tmp_path):
    rows = [{"q": f"Question {i}?", "a": f"Answer {i}.", "other": f"Another {i}."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    keys = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--prompt_template", "{q}", "--completion_template", "{a}"]
    (tmp_path / "r.yaml").write_text("model_name_or_path: demo/base\n")
    keys = ["--config", str(tmp_path / "r.yaml"), *keys, "--reference_columns"]
    recipe = load_recipe([*keys, "a", "other"], usage="")
    questions, _ = make_questions(recipe, make_chat(recipe))
    assert all(q.references[1].startswith("Another") and len(q.references) == 2 for q in questions)
    with pytest.raises(UserError, match="reference_columns: .* has no column 'othr'"):
        splits.make_examples(load_recipe([*keys, "othr"], usage=""))


def test_several_references_come_from_their_columns(tmp_path):
    rows = [{"text": f"Dialogue {i}.", "summary": f"Summary {i}."} for i in range(20)]
    several = [{"text": f"Talk {i}.", "one": f"First {i}.", "two": f"Second {i}." if i else ""} for i in range(3)]
    for name, part in (("train", rows), ("test", several)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(
        f"dataset_name: {tmp_path}\nprompt_template: '{{text}}'\ncompletion_template: '{{summary}}'\n"
        "reference_columns: [one, two]\n"
    )
    recipe = load_recipe(["--config", str(recipe_file)], usage="")
    questions, _ = make_questions(recipe, make_chat(recipe))
    assert [q.references for q in questions] == [["First 0."], ["First 1.", "Second 1."], ["First 2.", "Second 2."]]


def test_tool_calls_are_scored_by_what_the_template_writes(carelm_data):
    recipe = load_recipe(
        ["--config", "recipes/datasets/tau_airline_toolcalls.yaml", "--dataset_name",
         str(carelm_data / "tau_airline_toolcalls"), "--max_eval_samples", "4"], usage="")  # fmt: skip
    questions, _ = make_questions(recipe, make_chat(recipe))
    assert questions and all(r.strip() for q in questions for r in q.references)


# The file of predictions


def line(question: str, made_by: str) -> dict:
    return {"id": question, "made_by": made_by, "prediction": "a\u2028b"}


def test_a_half_written_line_is_made_again_and_others_are_kept(tmp_path, capsys):
    file = PredictionFile(tmp_path / "predictions-base.jsonl", {"1": "x", "2": "x", "3": "x"})
    assert file.open() == set()
    file.append(line("2", "x"))
    with open(file.path, "a") as torn:
        torn.write('{"id": "1", "made_by": "x", "pred')
    assert file.open() == {"2"}
    file.append(line("3", "x"))
    file.append(line("1", "x"))
    assert [p["id"] for p in file.close()] == ["1", "2", "3"]
    assert not list(tmp_path.glob("*.old-*"))


def test_predictions_of_another_model_are_kept_aside(tmp_path, capsys):
    before = PredictionFile(tmp_path / "predictions-base.jsonl", {"1": "x", "2": "x"})
    before.append(line("1", "x"))
    before.append(line("2", "x"))
    text = before.path.read_text()
    after = PredictionFile(before.path, {"1": "x", "2": "y"})
    assert after.open() == {"1"}
    assert (tmp_path / "predictions-base.old-1.jsonl").read_text() == text
    assert "are kept as predictions-base.old-1.jsonl" in capsys.readouterr().err


def test_answers_that_ended_at_other_tokens_are_other_answers(base, tmp_path):
    """The ids that end an answer are the base's and the chat template's; the prompt says nothing of them."""
    shutil.copytree(base, tmp_path / "base")
    keys = ["--model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path), "--max_eval_samples", "2"]
    recipe = load_recipe(keys, usage="")
    candidate = candidates.find(recipe, "base")
    asked, _ = make_questions(recipe, candidate.make_chat())

    def made_by():
        return answers.prepare(recipe, candidate, asked, tmp_path).file.made_by

    before = made_by()
    assert made_by() == before
    file = tmp_path / "base/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [40]}))
    assert not made_by().items() & before.items()


# The whole of it


KEYS = ("--max_eval_samples", "16", "--max_new_tokens", "12", "--num_latency_prompts", "4", "--num_resamples", "200")


def run_here(monkeypatch, capsys, *keys: str) -> dict:
    """eval/run.py in this process, without a launcher; its last line."""
    monkeypatch.setattr(sys, "argv", ["eval/run.py", *keys])
    monkeypatch.chdir(PROJECT)
    runpy.run_path("eval/run.py", run_name="__main__")
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A drawn adapter beside its base, compared by two ranks from the real launcher."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    make_adapter(folder)
    done = launch("--output_dir", folder, *KEYS, script="eval/run.py",
                  config_file=PROJECT / "accelerate_configs/cpu_zero2.yaml")  # fmt: skip
    return folder, json.loads(done.stdout.strip().splitlines()[-1])


def predictions(folder, name="adapter"):
    lines = (folder / f"eval/predictions-{name}.jsonl").read_text().split("\n")
    return {p["id"]: p["prediction"] for p in map(json.loads, filter(None, lines))}


def test_one_rank_and_two_make_the_same_predictions_and_scores(compared, tmp_path, monkeypatch, capsys):
    folder, last = compared
    alone = tmp_path / "run"
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("eval"))
    found = run_here(monkeypatch, capsys, "--output_dir", str(alone), *KEYS, "--max_batch_tokens", "600")
    assert predictions(alone) == predictions(folder) and predictions(alone, "base") == predictions(folder, "base")
    assert found["models"] == last["models"]


def test_without_prompts_to_time_the_report_has_no_latency(compared, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(compared[0], tmp_path / "run")
    keys = ("--output_dir", str(copy), *KEYS[:4], *KEYS[6:], "--num_latency_prompts", "0")
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    run_here(monkeypatch, capsys, *keys)
    assert err.getvalue().splitlines()[-2:] == [
        f"carelm: next: python train/chat.py {' '.join(chat_words([*keys]))}",
        f"carelm: next: python train/merge.py --adapter {copy} --output_dir {copy}/merged",
    ]
    results = json.loads((copy / "eval/results.json").read_text())
    assert all(
        m["latency"] == {"prompts": 0, "ttft_ms": {}, "tpot_ms": {}, "e2e_ms": {}} for m in results["models"].values()
    )
    report = (copy / "eval/report.md").read_text()
    assert "![latency]" not in report and "| prompts timed one at a time | 0 | 0 |" in report


def test_results_hold_every_promised_key(compared):
    folder, last = compared
    results = json.loads((folder / "eval/results.json").read_text())
    for model in results["models"].values():
        for score in ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match"):
            assert model[score]["low"] <= model[score]["value"] <= model[score]["high"]
        for times in ("ttft_ms", "tpot_ms", "e2e_ms"):
            assert model["latency"][times].keys() == {"p50", "p95", "p99"}
        assert model["throughput"]["examples_per_second"] > 0 and model["conditions"]["ranks"] == 2
        assert {"device", "threads", "max_batch_tokens", "versions"} <= model["conditions"].keys()
        assert model["peak_memory_bytes"] > 10**8 and model["total_parameters"] > 3_000_000
        assert sum(part["questions"] for part in model["categories"].values()) == results["test"]["questions"]
    assert results["models"]["adapter"]["trained_parameters"] == 1_196_032
    assert results["models"]["base"]["trained_parameters"] is None
    pair = results["pairs"][0]["scores"][results["primary_metric"]]
    assert {"difference", "standard_error", "low", "high", "p_value", "p_value_holm", "comparisons"} == pair.keys()
    assert last["verdicts"] == results["verdicts"] and len(results["verdicts"]) == 1
    assert {"decoding", "max_new_tokens", "num_resamples"} <= results["conditions"].keys()


def test_what_is_answered_is_not_answered_again(compared, monkeypatch, capsys):
    folder, last = compared
    monkeypatch.setattr("carelm.models.base.load_base", lambda *_: pytest.fail("a model was loaded"))
    assert run_here(monkeypatch, capsys, "--output_dir", str(folder), *KEYS) == last


def test_a_smaller_look_leaves_the_answers_of_the_larger_one(compared, tmp_path, monkeypatch, capsys):
    folder, _ = compared
    shutil.copytree(folder, tmp_path / "run")
    text = (folder / "eval/predictions-adapter.jsonl").read_text()
    few = ("--max_eval_samples", "4", "--models", "adapter", *KEYS[2:])
    run_here(monkeypatch, capsys, "--output_dir", str(tmp_path / "run"), *few)
    kept = (tmp_path / "run/eval/predictions-adapter.jsonl").read_text()
    assert sorted(kept.splitlines()) == sorted(text.splitlines())


def test_evaluating_the_base_first_does_not_claim_the_folder(tmp_path, monkeypatch, capsys):
    few = ("--max_eval_samples", "2", "--models", "base", *KEYS[2:])
    run_here(monkeypatch, capsys, "--output_dir", str(tmp_path / "run"), *few)
    assert runs.find_finished(load_recipe(["--output_dir", str(tmp_path / "run")], usage="")) is None


def test_all_models_answer_in_the_precision_that_the_run_has_kept(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    make_adapter(run)
    (run / "precision.json").write_text('{"precision": "bf16", "matmul_flops": {"fp32": 2e11, "bf16": 8e11}}')
    monkeypatch.setattr("carelm.models.precision.matmul_ceiling", lambda *_, **__: pytest.fail("it was measured again"))
    few = ("--output_dir", str(run), "--max_eval_samples", "2", "--precision", "auto", *KEYS[2:])
    run_here(monkeypatch, capsys, *few, "--models", "base", "adapter", "base@fp32")
    models = json.loads((run / "eval/results.json").read_text())["models"]
    assert [model["precision"] for model in models.values()] == ["bf16", "bf16", "fp32"]


def test_a_killed_comparison_goes_on_with_what_is_left(compared, tmp_path, monkeypatch, capsys):
    folder, last = compared
    torn = tmp_path / "run"
    shutil.copytree(folder, torn)
    file = torn / "eval/predictions-adapter.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    (torn / "eval/measured-adapter.json").unlink()
    number = len(text[: len(text) // 2].split("\n")) - 1
    monkeypatch.setattr(sys, "argv", ["eval/run.py", "--output_dir", str(torn), *KEYS])
    monkeypatch.chdir(PROJECT)
    runpy.run_path("eval/run.py", run_name="__main__")
    out = capsys.readouterr()
    assert f"{number} of {len(text.splitlines())} are there" in out.err
    assert json.loads(out.out.strip().splitlines()[-1])["models"] == last["models"]
    assert file.read_text() == text


def test_a_second_evaluation_of_a_run_is_refused_until_the_first_ends_which_hears_kill_int_in_the_background(
    tmp_path, monkeypatch, capsys
):
    few = ("--output_dir", str(tmp_path / "run"), *KEYS, "--models", "base")
    long = {"--max_eval_samples": "300", "--max_new_tokens": "60", "--num_latency_prompts": "300"}
    first = subprocess.Popen(
        [sys.executable, "eval/run.py", *few[:2], *few[-2:], *itertools.chain(*long.items())],
        cwd=PROJECT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    try:
        seen = next(line for line in first.stderr if "latency: " in line)  # it has the folder and is at work
        assert re.search(
            r"latency: \d+ answers, one at a time, about \d+ (s|minutes); num_latency_prompts: 0 leaves", seen
        )
        monkeypatch.setattr(sys, "argv", ["eval/run.py", *few])
        monkeypatch.chdir(PROJECT)
        with pytest.raises(UserError, match=f"run/eval is in use by process {first.pid} on .*; wait for it"):
            runpy.run_path("eval/run.py")["main"]()
        first.send_signal(signal.SIGINT)
        assert "error: interrupted" in first.communicate(timeout=30)[1] and first.returncode == 2
    finally:
        first.kill()
    run_here(monkeypatch, capsys, *few)  # a dead lock is no obstacle


def test_how_long_the_answers_of_all_models_will_take_is_said_once(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    recipe = load_recipe(["--num_latency_prompts", "50"], usage="")
    slow = pace.Pace(recipe, left=104)
    slow.begin(52)
    for _ in range(52):
        now[0] += 13
        slow.answered()
    assert capsys.readouterr().err.splitlines()[-1:] == [
        "carelm: about 20 minutes are left for the answers of all models; besides, up to 50 of each are timed one at a time "
        "(--num_latency_prompts 0: none); for a first look: --max_eval_samples 10, which counts conversations"
    ]
    quick = pace.Pace(recipe, left=104)
    quick.begin(52)
    for _ in range(52):
        now[0] += 0.5
        quick.answered()
    assert capsys.readouterr().err == ""


def test_an_evaluation_that_hangs_says_where_and_ends(tmp_path):
    file = tmp_path / "run/eval/predictions-base.jsonl"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)  # whoever reads it waits, as for a network disk that is away
    done = script("--output_dir", tmp_path / "run", *KEYS, "--models", "base", "--stall_timeout", 2, file="eval/run.py")
    assert done.returncode == 1
    assert "has hung for 2 s" in done.stderr and "predictions.py" in done.stderr


def test_reports_open_offline_and_escape_what_data_and_models_say(compared, tmp_path, monkeypatch, capsys):
    folder, _ = compared
    rows = [json.loads(x) for x in (PROJECT / "demo/data/test.jsonl").read_text().splitlines()[:16]]
    evil = "<script>alert(1)</script> | `x` "
    for row in rows:
        row["category"] = evil
        row["messages"][-1]["content"] = evil + row["messages"][-1]["content"]
    shutil.copytree(PROJECT / "demo/data", tmp_path / "data")
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = tmp_path / "run"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("eval"))
    keys = ("--config", "recipes/demo.yaml", "--output_dir", str(run), "--dataset_name", str(tmp_path / "data"))
    run_here(monkeypatch, capsys, *keys, *KEYS)
    page, text = ((run / f"eval/report.{kind}").read_text() for kind in ("html", "md"))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<script" not in text
    assert page.count("<svg") == 1  # the scores are bars of the page itself
    loads = re.findall(r"""(?:src|href)=["'](?!#)([^"']*)""", page)  # an address of an XML namespace loads nothing
    assert not loads
    assert "@import" not in page and "<link" not in page
    assert list((run / "eval").glob("events.out.tfevents.*"))


def test_a_recipe_with_labels_has_its_confusion_table_in_the_report(tmp_path, monkeypatch, capsys):
    kinds = [f"kind{i}" for i in range(12)]
    for name in ("train", "test"):
        rows = [{"q": f"{name}: ticket {k}?", "a": f"It is {k}."} for k in kinds]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.yaml").write_text(
        f"dataset_name: {tmp_path}\nprompt_template: '{{q}}'\ncompletion_template: '{{a}}'\nlabels: {kinds}\n"
        "primary_metric: macro_f1\nmodel_name_or_path: demo/base\n"
    )
    run_here(monkeypatch, capsys, "--config", str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "run"),
             "--models", "base", *KEYS)  # fmt: skip
    base = json.loads((tmp_path / "run/eval/results.json").read_text())["models"]["base"]
    assert base["macro_f1"] == base["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert all(base["confusion"][kind]["unparsable"] == 1 for kind in kinds)
    assert "Labels, base" in (tmp_path / "run/eval/report.html").read_text()
    found = json.loads((tmp_path / "run/eval/results.json").read_text())
    assert any("12 of 12 without a label). So scores of written answers say" in c for c in found["cautions"])
    assert "the right label in 0 of 12 questions, always answering kind0 in 1)" in found["headline"]
    assert "| kind11 |" in (tmp_path / "run/eval/report.md").read_text()


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("--models", "base", "adapter"), "there is no folder"),
        (("--models", "merged"), "merge first: python train/merge.py"),
        (("--models", "base@5bit"), "after @ stands none of"),
        (("--models", "base", "base"), "two are called 'base'"),
        (("--models", "demo/data"), "holds no model and no adapter"),
        (("--labels", "yes", "no", "unparsable"), "labels: .*a name of its own"),
        (("--labels", "yes"), "labels: 'yes' is the only one"),
        (("--labels", "yes", "yes"), "labels: .*a name of its own"),
        (("--primary_metric", "accuracy"), "needs labels"),
        (("--num_shots", "5000", "--models", "base"), "is more than the"),
        (("--models", "demo@home"), "there is no folder|after @ stands none of"),
        (("--labels", "yes", "no", "--primary_metric", "accuracy", "--models", "base"), "of 403 references hold none of"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_with_the_key_and_the_fix(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        recipe = load_recipe(["--output_dir", str(tmp_path / "none"), *keys], usage="")
        candidates.find_candidates(recipe)
        make_questions(recipe, make_chat(recipe))


def test_an_adapter_whose_base_has_changed_is_refused(tmp_path):
    recipe = make_adapter(tmp_path / "run")
    (tmp_path / "run/train_metrics.json").write_text(json.dumps({"base_fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="was trained on another base"):
        candidates.find(recipe, "adapter").check_base()


def test_an_adapter_whose_base_is_gone_is_refused(tmp_path):
    recipe = make_adapter(tmp_path / "run")
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    (tmp_path / "run/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    recipe.model["model_name_or_path"] = "/gone/base"
    with pytest.raises(UserError, match="base of .* is missing"):
        candidates.find(recipe, "adapter")


def test_another_base_than_the_adapters_own_is_refused(tmp_path, base):
    make_adapter(tmp_path / "run")
    weights = load_file(base / "model.safetensors")
    shutil.copytree(base, tmp_path / "base")
    save_file({k: v * 1.5 for k, v in weights.items()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    metrics = {"base_fingerprint": base_fingerprint(str(base))}
    (tmp_path / "run/train_metrics.json").write_text(json.dumps(metrics))
    recipe = load_recipe(
        ["--output_dir", str(tmp_path / "run"), "--model_name_or_path", str(tmp_path / "base")], usage=""
    )
    with pytest.raises(UserError, match="was trained on another base than .*/base now holds"):
        candidates.find(recipe, "adapter").check_base()


def test_a_damaged_checkpoint_and_one_without_tokenizer_are_refused(tmp_path, base):
    recipe = load_recipe([], usage="")
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.raises(UserError, match="models: .*/model holds no tokenizer"):
        candidates.find(recipe, str(tmp_path / "model"))
    shutil.copy(base / "tokenizer.json", tmp_path / "model")
    os.truncate(tmp_path / "model/model.safetensors", 100_000)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        candidates.find(recipe, str(tmp_path / "model"))


def test_pickled_weights_are_refused(tmp_path, base):
    (tmp_path / "model").mkdir()
    shutil.copy(base / "config.json", tmp_path / "model")
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled ones are not loaded"):
        candidates.find(load_recipe([], usage=""), str(tmp_path / "model"))


def test_a_checkpoint_without_chat_template_is_refused(tmp_path, base):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        candidates.find(load_recipe([], usage=""), str(tmp_path / "model")).make_chat()


def test_an_empty_test_split_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"q{i}", "a": "b"}) + "\n" for i in range(9)))
    (tmp_path / "r.yaml").write_text(
        f"dataset_name: {tmp_path}/rows.jsonl\nprompt_template: '{{q}}'\ncompletion_template: '{{a}}'\ntest_fraction: 0\n"
    )
    recipe = load_recipe(["--config", str(tmp_path / "r.yaml")], usage="")
    with pytest.raises(UserError, match="dataset_test_split"):
        make_questions(recipe, make_chat(recipe))


def test_zero3_is_refused_with_the_file_to_use():
    done = launch(script="eval/run.py", config_file=PROJECT / "accelerate_configs/cpu_zero3.yaml", check=False)
    assert done.returncode != 0 and "accelerate_configs/multi_gpu.yaml" in done.stderr


def test_unlike_models_are_said_to_be_unlike(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/run.py", "--output_dir", str(tmp_path / "run"), "--models", "base", "base@bf16",
                                      "--max_eval_samples", "3", "--max_new_tokens", "4", "--num_resamples", "50"])  # fmt: skip
    monkeypatch.chdir(PROJECT)
    runpy.run_path("eval/run.py", run_name="__main__")
    results = json.loads((tmp_path / "run/eval/results.json").read_text())
    cautions = results["cautions"]
    assert "3 conversations are too few to tell" in results["verdicts"][0]
    unlike = "(base: 4-bit weights, computed in fp32; base@bf16: whole weights, computed in bf16). This is no fault"
    assert any(unlike in c for c in cautions)


def test_models_with_the_same_answers_are_nothing_to_rate_and_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    found = run_here(monkeypatch, capsys, "--output_dir", str(tmp_path / "run"), "--models", "base", "base@fp32", "--rate",
                     "--max_eval_samples", "12", "--max_new_tokens", "4", "--num_resamples", "50", "--num_latency_prompts", "0",
                     "--load_in_4bit", "false")  # fmt: skip
    assert (
        "base@fp32 gives the same answers as the base to all 16 questions, to the letter (ROUGE-L" in found["headline"]
    )
    assert found["headline"].startswith("No difference. ") and "anywhere" not in found["headline"]
    assert "carelm: rate: both models give the same answers, so there is nothing to rate" in err.getvalue()
    assert f"carelm: report: {tmp_path}/run/eval/report.html" in err.getvalue()


def test_an_adapter_that_holds_nan_is_named_before_anything_is_answered(tmp_path):
    recipe = make_adapter(tmp_path / "run")
    candidate = candidates.find(recipe, "adapter")
    candidate.check_finite()
    file = tmp_path / "run/adapter_model.safetensors"
    tensors = load_file(file)
    for name in sorted(tensors)[:3]:
        tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"models: adapter .*run holds NaN in 3 of {len(tensors)} tensors"):
        candidate.check_finite()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        candidate.check_finite()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if "layers.2." not in n},
            "14 tensors, such as .*layers.2.* are missing",
        ),
        (
            lambda tensors: tensors | {n.replace("layers.3.", "layers.9."): t.clone() for n, t in tensors.items()},
            "14 tensors, such as .*layers.9.* are for no part of that base",
        ),
        (lambda tensors: {n: t[:-1].contiguous() for n, t in tensors.items()}, "size mismatch"),
    ],
    ids=["missing", "of a larger base", "another size"],
)
def test_an_adapter_that_does_not_fit_is_named_and_not_half_used(tmp_path, change, line):
    recipe = make_adapter(tmp_path / "run", "--load_in_4bit", "false")
    candidate = candidates.find(recipe, "adapter")
    file = tmp_path / "run/adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(
        UserError, match=f"models: .*run belongs to another base than .*, or its file is not whole .*{line}"
    ):
        candidate.load(candidate.make_chat())


def test_a_model_that_holds_infinity_in_its_precision_is_named(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["model.norm.weight"][0] = 1e5  # more than fp16 holds
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    recipe = load_recipe(["--model_name_or_path", str(tmp_path / "base"), "--load_in_4bit", "false"], usage="")
    candidate = candidates.find(recipe, "base@fp16")
    with pytest.raises(UserError, match="models: base@fp16 in fp16 holds NaN or infinity in 1 tensors"):
        candidate.load(candidate.make_chat())
