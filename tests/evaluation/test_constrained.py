"""Every label of the recipe is scored with the ids of training, alike in any batch and with any adapter."""

import json
import runpy
import sys

import pytest
import torch
import yaml
from drawn import make_adapter
from launching import PROJECT

from carelm.chat.chat import make_chat
from carelm.data.label_form import Form, find_form
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation import answers, candidates, constrained
from carelm.evaluation.questions import Question, make_questions, make_questions_of_both
from carelm.models import likelihood
from carelm.recipe_file import load_recipe
from carelm.training import stops

CPU = torch.device("cpu")
THINGS = ("lamp", "kettle", "chair", "phone", "table", "router", "cable", "mirror", "blender", "scarf")
PROMPTS = [[5, 6, 7, 8], [9] * 13, [4, 3, 2], [11, 12, 13, 14, 15, 16, 17]]
ANSWERS = [[[20, 21, 2], [20, 22, 23, 2], [20, 21, 24, 2]]] * 4  # they begin alike, and of two one begins the other


def write_rows(folder, number=60, reasons=True):
    """Pairs of questions on the same thing or not; of the labels one begins the other."""
    rows = []
    for i in range(number):
        one, two = THINGS[i % 10], THINGS[(i + (i % 3 == 0)) % 10]
        why = f"Both are about the {one}." if one == two else f"One is the {one}, one the {two}."
        rows.append({"one": f"How do I return my {one}, number {i}?", "two": f"Is there help with the {two}?",
                     "why": why, "same": "match" if one == two else "match not"})  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "dataset_name": f"{folder}/rows.jsonl", "prompt_template": "A: {one}\nB: {two}", "labels": ["match", "match not"],
        "completion_template": "Reason: {why}\nLabel: {same}" if reasons else "{same}", "overlap_columns": ["one", "two"],
        "test_fraction": 0.25, "validation_fraction": 0.25, "max_new_tokens": 10, "num_latency_prompts": 1,
        "num_resamples": 100, "precision": "fp32", "primary_metric": "constrained_macro_f1",
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(keys))
    return ["--config", str(folder / "r.yaml"), "--output_dir", str(folder / "run")]


def by_hand(model, prompt, answers):
    """How much likelier each whole answer is than the first one, by a forward of its own."""
    found = []
    for ids in answers:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -len(ids) - 1 : -1].double()
        found.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
    return [value - found[0] for value in found]


def score(model, budget=10**6):
    found = [None] * len(PROMPTS)
    likelihood.score_answers(
        model,
        PROMPTS,
        ANSWERS,
        device=CPU,
        max_batch_tokens=budget,
        done=lambda i, values: found.__setitem__(i, values),
    )
    return found


@pytest.mark.parametrize("keys", [("--load_in_4bit", "false"), (), ("--method", "prompt_tuning")], ids=str)
def test_answers_have_their_log_probabilities_whatever_the_batch_and_the_adapter(tmp_path, keys):
    recipe = make_adapter(tmp_path / "run", *keys)
    candidate = candidates.find(recipe, "adapter")
    with torch.no_grad():
        model, _ = candidate.load(candidate.make_chat())
        for budget in (10**6, 90, 1):
            for prompt, answers, found in zip(PROMPTS, ANSWERS, score(model, budget)):
                wanted = by_hand(model, prompt, answers)
                assert [value - found[0] for value in found] == pytest.approx(wanted, abs=2e-3)


def test_a_batch_that_memory_does_not_hold_is_halved_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    recipe = load_recipe(["--load_in_4bit", "false"], usage="")
    candidate = candidates.find(recipe, "base")
    model, _ = candidate.load(candidate.make_chat())
    whole, plain = score(model), likelihood._behind_shared

    def small_memory(model, prefixes, rests, device):
        if len(prefixes) > 2:
            raise torch.OutOfMemoryError
        return plain(model, prefixes, rests, device)

    monkeypatch.setattr(likelihood, "_behind_shared", small_memory)
    for a, b in zip(score(model), whole):
        assert a == pytest.approx(b, abs=1e-3)
    assert "out of memory with a batch of 4; goes on with 2" in capsys.readouterr().err


@pytest.mark.parametrize("reasons", [True, False])
def test_the_ids_of_a_label_are_those_of_training(tmp_path, reasons):
    recipe = load_recipe(write_rows(tmp_path, reasons=reasons), usage="")
    chat = make_chat(recipe)
    questions, _ = make_questions(recipe, chat)
    form = find_form(recipe, map(Question.expected, questions))
    rendered, _ = chat.render(make_examples(recipe)[0]["test"])
    for question, trained in zip(questions, rendered):
        reason = form.reason(question.references[0]) if reasons else ""
        assert reason.startswith("Reason: ") == reasons and "Label" not in reason
        _, ids = constrained.answers_with(chat, form, question, reason, room=10**6)
        right = ids[form.labels.index(form.true_label(question.references[0]))]
        assert chat.prompt_ids(question.messages) + right == trained.input_ids.tolist()
        assert all(one[-1] == chat.end_of_turn_id for one in ids)


def test_a_free_answer_gives_its_reason_up_to_the_label():
    form = Form(("yes", "no"), True, "\nLabel: ", "")
    assert form.reason("Reason: both are.\nLabel: yes") == "Reason: both are."
    assert form.reason("Reason: both are.\nLabel:") == "Reason: both are."
    assert form.reason("Both are, I think") == "Both are, I think"
    assert form.reason("Reason: both are.\nLabel: yes\nText A: a lamp\nLabel: no") == "Reason: both are."
    assert form.reason("Label: yes, I think") == ""
    assert Form(("yes", "no"), False, "", "").reason("yes") == ""
    assert form.answer("no", "Both are.") == "Both are.\nLabel: no"


@pytest.mark.parametrize("between, answer, reason", [
    ("\n", "One.\nTwo.\nYes.", "One.\nTwo."), ("\n", "One.\nTwo goes on", "One.\nTwo goes on"),
    (": ", "That is: a lamp: no", "That is: a lamp"), (": ", "That is: a lamp", "That is: a lamp"),
])  # fmt: skip
def test_a_reason_keeps_what_only_looks_like_the_text_before_the_label(between, answer, reason):
    assert Form(("yes", "no"), True, between, "").reason(answer) == reason


def test_a_reason_is_cut_where_the_model_has_no_more_positions(tmp_path):
    recipe = load_recipe(write_rows(tmp_path), usage="")
    chat = make_chat(recipe)
    questions, _ = make_questions(recipe, chat)
    form = find_form(recipe, map(Question.expected, questions))
    reason, ids = constrained.answers_with(chat, form, questions[0], "It is about the lamp. " * 30, room=40)
    assert reason and max(map(len, ids)) <= 40


def test_labels_that_answers_do_not_end_in_are_not_scored_which_is_said(tmp_path, capsys):
    keys = write_rows(tmp_path)
    turned = [*keys, "--completion_template", "Label: {same} because {why}", "--primary_metric"]
    recipe = load_recipe([*turned, "accuracy"], usage="")
    questions, _ = make_questions(recipe, make_chat(recipe))
    assert find_form(recipe, map(Question.expected, questions)) is None
    assert "labels are read from free answers and not scored by their probability" in capsys.readouterr().err
    recipe = load_recipe([*turned, "constrained_accuracy"], usage="")
    with pytest.raises(
        UserError, match="primary_metric: constrained_accuracy cannot be had: the answer of rows.jsonl:"
    ):
        find_form(recipe, map(Question.expected, questions))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("--overlap_columns", "one"), "overlap_columns: 1 columns and 2 labels; it takes two of each"),
        (("--overlap_columns", "one", "tow"), "overlap_columns: rows.jsonl has no column 'tow'"),
        (("--labels", "match"), "overlap_columns: 2 columns and 1 labels"),
    ],
)
def test_keys_of_labels_that_do_not_fit_are_one_line(tmp_path, keys, line):
    with pytest.raises(UserError, match=line):
        recipe = load_recipe([*write_rows(tmp_path), *keys], usage="")
        make_examples(recipe)


def evaluate(keys):
    """eval/run.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval/run.py", *keys, "--models", "base"])
        patch.chdir(PROJECT)
        runpy.run_path("eval/run.py", run_name="__main__")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The base, and what it left."""
    folder = tmp_path_factory.mktemp("labels")
    keys = write_rows(folder)
    evaluate(keys)
    return folder, keys


def read_lines(folder, name):
    lines = (folder / f"run/eval/{name}.jsonl").read_text().splitlines()
    return {line["id"]: line for line in map(json.loads, lines)}


def test_labels_are_scored_behind_the_reason_that_was_written(evaluated):
    folder, keys = evaluated
    recipe = load_recipe(keys, usage="")
    candidate = candidates.find(recipe, "base")
    chat = candidate.make_chat()
    model, _ = candidate.load(chat)
    questions, validation, _ = make_questions_of_both(recipe, chat)
    for name, asked in (("base", questions), ("base.validation", validation)):
        said, scored = read_lines(folder, f"predictions-{name}"), read_lines(folder, f"labels-{name}")
        assert list(scored) == [q.id for q in asked] and len(asked) > 5
        for question in asked[:4]:
            reason = said[question.id]["prediction"]
            answers = [
                chat.answer_ids(question.messages, {"role": "assistant", "content": f"{reason}\nLabel: {label}"})
                for label in recipe.labels
            ]
            with torch.no_grad():
                wanted = by_hand(model, chat.prompt_ids(question.messages), answers)[1]
            found = scored[question.id]["log_probabilities"]
            assert found["match not"] - found["match"] == pytest.approx(wanted, abs=2e-3)


def test_the_report_has_labels_as_written_and_chosen_how_sure_they_are_and_the_baselines(evaluated):
    folder, _ = evaluated
    results = json.loads((folder / "run/eval/results.json").read_text())
    model = results["models"]["base"]
    assert sum(sum(row.values()) for row in model["constrained_confusion"].values()) == results["test"]["questions"]
    assert all(row["unparsable"] == 0 for row in model["constrained_confusion"].values())
    after, before = (model["calibration"][when]["negative_log_likelihood"] for when in ("after", "before"))
    assert after < before and model["calibration"]["temperature"] > 1  # it was never trained to say these
    assert model["precision_recall"]["positive"] == "match" and model["decided"]["at_precision"] == 0.95
    for baseline in results["baselines"].values():
        assert baseline["macro_f1"]["value"] > 0.9
        less = baseline["differences"]["base"]["constrained_macro_f1"]
        assert less["difference"] == pytest.approx(
            model["constrained_macro_f1"]["value"] - baseline["macro_f1"]["value"]
        )
    for page in ("report.html", "report.md"):
        text = (folder / "run/eval" / page).read_text()
        for words in ("word overlap, of the shorter text", "How sure the labels are", "the likeliest of the list"):
            assert words in text


def test_the_same_again_loads_nothing_and_a_lost_label_is_scored_alone(evaluated, capsys):
    folder, keys = evaluated
    file = folder / "run/eval/labels-base.jsonl"
    before = file.read_text()
    evaluate(keys)
    assert "answers are there; nothing to do" in capsys.readouterr().err and file.read_text() == before
    old = read_lines(folder, "labels-base")
    file.write_text("".join(before.splitlines(keepends=True)[1:]))
    evaluate(keys)
    assert f"labels-base.jsonl: {len(old) - 1} of {len(old)} are there" in capsys.readouterr().err
    assert_alike(read_lines(folder, "labels-base"), old)


def test_two_ranks_score_each_question_once_and_as_one_rank_does(evaluated, monkeypatch):
    """One rank after the other in this process; what rank 0 shares is kept for the second."""
    folder, keys = evaluated
    old, file = read_lines(folder, "labels-base"), folder / "run/eval/labels-base.jsonl"
    recipe = load_recipe(keys, usage="")
    candidate = candidates.find(recipe, "base")
    model, _ = candidate.load(candidate.make_chat())
    questions, _ = make_questions(recipe, make_chat(recipe))
    form = find_form(recipe, map(Question.expected, questions))
    part = answers.prepare(recipe, candidate, questions, file.parent, form)
    file.unlink()
    shared, watch, lines = [], stops.HangWatch(0), []
    for rank in (0, 1):
        monkeypatch.setattr(constrained.ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(constrained.ranks, "world_size", lambda: 2)
        kept = iter(shared[:])
        monkeypatch.setattr(
            constrained.ranks,
            "share",
            lambda value, rank=rank, kept=kept: next(kept) if rank else shared.append(value) or value,
        )
        monkeypatch.setattr(constrained.ranks, "gather", lambda value: [value])
        assert constrained.score_labels(recipe, part, form, model, CPU, watch)["examples"] == len(old)
        lines.append(len(file.read_text().splitlines()))
    assert lines == [(len(old) + 1) // 2, len(old)]
    assert_alike(read_lines(folder, "labels-base"), old)


def assert_alike(found, wanted):
    assert found.keys() == wanted.keys()
    for question, line in wanted.items():
        assert found[question]["log_probabilities"] == pytest.approx(line["log_probabilities"], abs=1e-3)


def test_several_reasons_are_several_references_with_the_same_label(tmp_path):
    keys = write_rows(tmp_path)
    rows = [json.loads(line) | {"other": "So it is."} for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe([*keys, "--reference_columns", "why", "other"], usage="")
    questions, _ = make_questions(recipe, make_chat(recipe))
    for question in questions:
        label = find_form(recipe, map(Question.expected, questions)).true_label(question.references[0])
        assert question.references[0].startswith("Reason: ") and question.references[0].endswith(f"\nLabel: {label}")
        assert question.references[1] == f"Reason: So it is.\nLabel: {label}"


def test_labels_that_the_data_spells_otherwise_are_not_scored_with_several_references_either(tmp_path):
    keys = [*write_rows(tmp_path), "--reference_columns", "why", "two", "--labels", "Match", "Match not"]
    recipe = load_recipe(keys, usage="")
    questions, _ = make_questions(recipe, make_chat(recipe))
    with pytest.raises(UserError, match="does not end in a label as the list has it"):
        find_form(recipe, map(Question.expected, questions))
