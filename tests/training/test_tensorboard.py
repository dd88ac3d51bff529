"""What TensorBoard shows: curves that hold no step twice, answers as they were written, keys beside final scores."""

import html
import re
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from carelm.evaluation import report
from carelm.models.generation import Answer
from carelm.recipe_file import load_recipe, save_recipe
from carelm.training import runs, tensorboard
from carelm.training.tensorboard import SampleAnswers, TensorBoard

METRICS = {
    "eval_loss_before": 6.1, "eval_loss": 1.25, "train_loss": 1.5, "global_step": 12, "num_train_tokens": 1000,
    "trainable_parameters": 8, "trainable_percent": 7.9, "precision": "bf16", "world_size": 1, "zero_stage": 0,
    "wall_seconds": 100.0,
}  # fmt: skip
ODD_TEXTS = [
    "# no heading\n* no list\n1. nor this\n> nor that",
    "| no | table |\n|---|---|\n| a | b |",
    "```\nno fence\n```\n\n\n    no code",
    "<b>no HTML</b> &amp; no entity <script>alert(1)</script>",
    "*no* _emphasis_ `no code` [no](link) ![no](picture) \\* http://no.link",
    "  two blanks  and\ta tab\r\nand an umlaut: ü, 東京",
]


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def texts(events, tag) -> dict[int, str]:
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def begin(folder, at_step=0, is_first_rank=True) -> types.SimpleNamespace:
    """A part of a run that goes on from this step: its callback, and what logs and evaluates at a step."""
    shown = {"tokens_per_second": 900.0, "host_memory_gib": 1.5}
    callback = TensorBoard(folder, types.SimpleNamespace(shown=shown))
    state = types.SimpleNamespace(global_step=at_step, is_world_process_zero=is_first_rank)
    callback.on_train_begin(None, state, None)

    def log(step, **logs):
        state.global_step = step
        callback.on_log(None, state, None, logs=logs | {"epoch": step / 10})

    return types.SimpleNamespace(callback=callback, log=log)


def steps(events, tag) -> list[int]:
    return [e.step for e in events.Scalars(tag)]


def test_a_killed_run_that_goes_on_holds_no_step_twice_nor_the_evaluation_it_has_to_make_again(tmp_path):
    first = begin(tmp_path)
    for step in range(1, 6):
        first.log(step, loss=1.0 / step, learning_rate=0.1)
        if step == 3:  # saved at step 3, before its evaluation, and killed after step 5
            first.log(3, eval_loss=2.0)
            first.callback.add_text("answers/0", "said at 3", 3)
    first.callback.add_text("answers/0", "said at 5", 5)
    with open(next(tmp_path.iterdir()), "ab") as file:
        file.write(b"half a record")
    second = begin(tmp_path, at_step=3)
    second.log(3, eval_loss=2.0)
    second.callback.add_text("answers/0", "said at 3", 3)
    for step in range(4, 7):
        second.log(step, loss=1.0 / step, learning_rate=0.1)
    second.log(6, eval_loss=1.5)
    second.callback.add_text("answers/0", "said at 6", 6)
    second.callback.on_train_end(None, None, None)
    events = read(tmp_path)
    for tag in ("train/loss", "train/epoch", "usage/tokens_per_second"):
        assert steps(events, tag) == [1, 2, 3, 4, 5, 6], tag
    assert steps(events, "eval/loss") == [3, 6] and texts(events, "answers/0") == {3: "said at 3", 6: "said at 6"}
    assert len(events.Tensors("custom_scalars__config__")) == 1


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew_without_what_it_had_shown(tmp_path):
    first = begin(tmp_path)
    for step in range(1, 4):
        first.log(step, loss=9.0)
    second = begin(tmp_path)
    second.log(1, loss=1.0)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0)]
    assert len(events.Tensors("custom_scalars__config__")) == 1


def test_a_run_that_gets_tensorboard_when_it_goes_on_gets_the_charts_too(tmp_path):
    for step in (4, 8):
        begin(tmp_path / "runs", at_step=step).log(step + 1, loss=1.0)
    events = read(tmp_path / "runs")
    assert steps(events, "train/loss") == [5, 9] and len(events.Tensors("custom_scalars__config__")) == 1


def test_only_the_first_rank_writes(tmp_path):
    begin(tmp_path, is_first_rank=False).log(1, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_the_first_charts_are_loss_beside_eval_loss_learning_rate_and_speed(tmp_path):
    run = begin(tmp_path)
    run.log(1, loss=2.0, learning_rate=0.1)
    run.log(1, eval_loss=3.0)
    events = read(tmp_path)
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    (category,) = layout_pb2.Layout.FromString(content).category
    matched = [
        [[tag for tag in events.Tags()["scalars"] if re.match(wanted, tag)] for wanted in chart.multiline.tag]
        for chart in category.chart
    ]
    assert matched == [[["train/loss"], ["eval/loss"]], [["train/learning_rate"]], [["usage/tokens_per_second"]]]
    assert [e.value for e in events.Scalars("usage/host_memory_gib")] == [1.5]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_an_answer_stands_in_tensorboard_as_it_was_written(text, tmp_path, monkeypatch):
    run = begin(tmp_path)
    chat = types.SimpleNamespace(prompt_ids=lambda *_, **__: [1], answer_text=lambda *_, **__: "As expected.")
    monkeypatch.setattr(tensorboard, "answer_in_training", lambda *_, **__: [Answer(text, (1, 2, 3), "stop")])
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look_up"}}]}
    sample = {"prompt": [{"role": "user", "content": text}, called], "completion": [{}], "tools": None}
    state = types.SimpleNamespace(global_step=4)
    SampleAnswers(chat, [sample], 8, run.callback).on_evaluate(None, state, None)
    page = markdown_to_safe_html(texts(read(tmp_path), "answers/0")[4])
    assert {*re.findall(r"<(\w+)", page)} <= {"p", "strong", "blockquote", "br"}
    quoted = re.findall(r"(?s)<blockquote>\s*<p>(.*?)</p>\s*</blockquote>", page)
    user, call, answer, expected = (html.unescape(part.replace("<br>", "\n")).replace("\xa0", " ") for part in quoted)
    assert user == answer == "\n".join(text.expandtabs(4).splitlines())
    assert "look_up" in call and expected == "As expected."


@pytest.fixture
def recipe(tmp_path):
    keys = f"--config recipes/demo.yaml --lora_r 8 --max_steps 12 --output_dir {tmp_path}/run"
    recipe = load_recipe(keys.split(), usage="")
    recipe.output_dir.mkdir()
    save_recipe(recipe, recipe.output_dir / "recipe.yaml")
    return recipe


def compared(recipe) -> tuple[dict, dict]:
    """The run's keys and its figures, as HParams compares them."""
    events = read(recipe.output_dir / "runs/final")
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    keys = parse_session_start_info_plugin_data(content).hparams
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in keys.items()}
    return values, {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_finished_run_has_its_keys_and_defaults_beside_its_eval_loss(recipe):
    runs.finish(recipe, METRICS, {"train": {"rows": 8, "used": 8}})
    keys, figures = compared(recipe)
    wanted = {"method": "lora", "lora_r": 8, "learning_rate": 0.002, "global_batch_size": 8, "max_steps": 12,
              "model_name_or_path": "demo/base", "load_in_4bit": "true", "load_in_8bit": "false", "precision": "bf16",
              "lora_dropout": 0, "seed": 42}  # fmt: skip
    assert {key: keys[key] for key in wanted} == wanted and not {"num_virtual_tokens", "num_train_epochs"} & keys.keys()
    assert figures == {"verdict/eval_loss": [(12, 1.25)]}


@pytest.mark.parametrize("report_to, eval_loss", [("none", 1.25), ("tensorboard", None)])
def test_a_run_without_tensorboard_or_eval_loss_finishes(recipe, report_to, eval_loss):
    recipe.training["report_to"] = [report_to]
    runs.finish(recipe, METRICS | {"eval_loss": eval_loss}, {"train": {"rows": 8, "used": 8}})
    assert (recipe.output_dir / "train_metrics.json").exists()
    assert (recipe.output_dir / "runs").exists() == (report_to == "tensorboard")
    assert report_to == "none" or compared(recipe)[1] == {}


def of_models(*folders, metric="rougeL") -> dict:
    """Results of the base and of the models in these folders."""
    kinds = {"base": ("base", "demo/base")} | {name: ("adapter", str(folder)) for name, folder in folders}
    models = {
        name: {"kind": kind, "folder": folder, metric: {"value": 0.1 * k, "low": 0.0, "high": 1.0}}
        for k, (name, (kind, folder)) in enumerate(kinds.items(), 1)
    }
    return {"primary_metric": metric, "models": models}


def test_the_deciding_score_is_written_once_beside_them_however_often_it_is_evaluated(recipe):
    runs.finish(recipe, METRICS, {"train": {"rows": 8, "used": 8}})
    for _ in range(2):
        report._write_final(recipe.output_dir, of_models(("adapter", recipe.output_dir)))
    assert compared(recipe)[1] == {"verdict/eval_loss": [(12, 1.25)], "verdict/rougeL": [(12, 0.2)]}


def test_the_score_of_another_run_s_model_or_of_the_base_alone_is_not_this_run_s(recipe, tmp_path):
    runs.finish(recipe, METRICS, {"train": {"rows": 8, "used": 8}})
    for results in (of_models(("other", tmp_path / "other")), of_models()):
        report._write_final(recipe.output_dir, results)
        assert [*compared(recipe)[1]] == ["verdict/eval_loss"]


def test_scores_of_the_evaluation_stand_in_a_group_of_their_own(tmp_path):
    results = of_models(("adapter|x", tmp_path)) | {"headline": "No. <b> is not bold.", "besides": [], "verdicts": []}
    for _ in range(2):
        report._write_tensorboard(tmp_path, results, {})
    events = read(tmp_path)
    assert events.Tags()["tensors"] == ["verdict/answer/text_summary", "verdict/scores/text_summary"]
    assert not events.Tags()["scalars"] and "&lt;b&gt;" in texts(events, "verdict/answer")[0]
    table = markdown_to_safe_html(texts(events, "verdict/scores")[0])
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", table)
    assert cells == ["score", "base", "adapter|x", "ROUGE-L", "0.100 (0.000 to 1.000)", "0.200 (0.000 to 1.000)"]
