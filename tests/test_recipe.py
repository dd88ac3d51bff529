"""A recipe is checked key by key before anything is loaded, and its file describes the run completely."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import PROJECT

from carelm.errors import UserError
from carelm.key_help import format_help
from carelm.keys import EVALUATION_KEYS, MEANT, REFUSED, known_keys
from carelm.next_steps import chat_words, words_of
from carelm.recipe_file import check_identity, load_recipe, save_recipe

MAPS = sorted((PROJECT / "recipes/datasets").glob("*.yaml"))
RECIPES = [*sorted((PROJECT / "recipes").glob("*.yaml")), *MAPS]
SMALL = {
    "model_name_or_path": "demo/base",
    "dataset_name": "rows.jsonl",
    "prompt_template": "{question}",
    "completion_template": "{answer}",
}


@pytest.fixture
def load(tmp_path):
    """Loads a small recipe with the keys given, and the words of a command line."""

    def load(*words: str, **keys):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(SMALL | keys), encoding="utf-8")
        return load_recipe(["--config", str(path), *words], usage="")

    return load


def message_of(load, *words, **keys) -> str:
    with pytest.raises(UserError) as caught:
        load(*words, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Recipes that come with the project


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_its_header_says_how_to_start_it(path):
    recipe = load_recipe(["--config", str(path)], usage="")
    assert recipe.name == path.stem
    assert str(recipe.output_dir) == f"outputs/{path.stem}"
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    starts = ("# Command: accelerate launch train/sft.py", "# Command: python serve/index.py")
    assert any(line.startswith(starts) for line in header)


def test_no_recipe_named_means_the_demo():
    assert load_recipe([], usage="").name == "demo"


@pytest.mark.parametrize("path", MAPS, ids=lambda p: p.stem)
def test_a_recipe_that_maps_a_dataset_leaves_base_and_learning_rate_to_whoever_uses_it(path):
    assert not {"model_name_or_path", "learning_rate"} & yaml.safe_load(path.read_text()).keys()
    assert load_recipe(["--config", str(path)], usage="").training["learning_rate"] == 2e-4
    recipe = load_recipe(["--config", str(path), "--config", "recipes/overlays/demo_base.yaml"], usage="")
    assert (recipe.model["model_name_or_path"], recipe.training["learning_rate"]) == ("demo/base", 2e-3)
    assert str(recipe.output_dir) == f"outputs/{path.stem}+demo_base"


def test_a_recipe_without_a_base_says_which_one_it_takes(load, capsys):
    load()
    assert "base" not in capsys.readouterr().err
    load_recipe(["--config", "recipes/datasets/sgd.yaml"], usage="")
    assert "names no base: demo/base is taken" in capsys.readouterr().err


# Overlays


@pytest.fixture
def lay(tmp_path):
    """Loads files of these keys, one laid over the other, and the words of a command line."""

    def lay(*files: dict, words: tuple[str, ...] = ()):
        configs = []
        for number, keys in enumerate(files):
            path = tmp_path / f"file{number}.yaml"
            path.write_text(yaml.safe_dump(keys), encoding="utf-8")
            configs += ["--config", str(path)]
        return load_recipe([*configs, *words], usage="")

    return lay


def test_a_later_file_wins_key_by_key_and_the_command_line_over_all(lay, tmp_path):
    recipe = lay(
        SMALL | {"seed": 1, "max_length": 64}, {"seed": 2, "max_length": 32}, {"seed": 3}, words=("--lora_r", "4")
    )
    assert (recipe.seed, recipe.max_length, recipe.model["lora_r"]) == (3, 32, 4)
    assert recipe.prompt_template == SMALL["prompt_template"]
    assert (recipe.name, str(recipe.output_dir)) == ("file0+file1+file2", "outputs/file0+file1+file2")
    assert lay(SMALL, {"seed": 2}, words=("--seed", "7", "--output_dir", "out")).seed == 7
    assert str(lay(SMALL, {"output_dir": "mine"}).output_dir) == "mine"
    save_recipe(recipe, tmp_path / "recipe.yaml")  # one complete file
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage="").keys() == recipe.keys()


TEMPLATES = {"prompt_template": "{q}", "completion_template": "{a}"}
MESSAGES = {"messages_column": "turns", "assistant_roles": ["agent"]}
TICKETS = {"text_column": "t", "role_column": "r", "conversation_column": "c", "id_column": "i"}


@pytest.mark.parametrize(
    ("first", "second", "left", "gone"),
    [
        (TEMPLATES, MESSAGES, "messages_column", ["prompt_template", "completion_template"]),
        (MESSAGES, TEMPLATES, "completion_template", ["messages_column"]),
        (TEMPLATES | {"load_in_4bit": True}, {"load_in_8bit": True}, "load_in_8bit", ["load_in_4bit"]),
        (MESSAGES | {"load_in_8bit": True}, {"load_in_4bit": True}, "load_in_4bit", ["load_in_8bit"]),
        (TICKETS | {"order_column": "n"}, {"reply_to_column": "to"}, "reply_to_column", ["order_column"]),
        (
            TICKETS | {"reply_to_column": "to"},
            MESSAGES,
            "messages_column",
            ["text_column", "role_column", "conversation_column", "reply_to_column"],
        ),
        (
            TEMPLATES | {"keep_test_questions": True},
            {"drop_near_duplicates": True},
            "drop_near_duplicates",
            ["keep_test_questions"],
        ),
    ],
)
def test_another_way_to_say_it_takes_the_place_of_an_earlier_files(lay, capsys, first, second, left, gone):
    as_text = {k: v if isinstance(v, list) else [str(v).lower()] for k, v in second.items()}
    words = tuple(word for key, texts in as_text.items() for word in (f"--{key}", *texts))
    for files, added in (((first, second), ()), ((first,), words)):
        keys = lay(*files, words=added).keys()
        assert keys[left] and not any(keys.get(key) for key in gone)
        said = capsys.readouterr().err
        assert all(f"takes the place of {key}" in said for key in gone)


def test_what_does_not_choose_another_way_leaves_the_earlier_one(lay, capsys):
    for over in (
        {"messages_column": None},
        {"load_in_8bit": False},
        {"prompt_template": "Please: {q}"},
        {"user_roles": ["x"]},
    ):
        recipe = lay(TEMPLATES | {"load_in_4bit": True}, over)
        assert recipe.bits == 4 and recipe.completion_template == "{a}"
    assert "takes the place" not in capsys.readouterr().err


def test_the_next_chat_has_nothing_that_says_how_an_evaluation_is_made():
    words = [
        "--config",
        "r.yaml",
        "--num_latency_prompts",
        "2",
        "--max_eval_samples=9",
        "--top_p",
        "0.9",
        "--labels",
        "a",
        "b",
    ]
    assert chat_words(words) == ["--config", "r.yaml", "--top_p", "0.9"]


@pytest.mark.parametrize(
    ("first", "over", "words", "named"),
    [
        (MESSAGES, {}, ("--prompt_template", "{q}"), "completion_template is not"),
        (MESSAGES, TEMPLATES | {"messages_column": "other"}, (), "prompt_template and messages_column: set only one"),
        (SMALL, {"learning_rte": 1}, (), "file1.yaml: unknown key 'learning_rte'"),
        (SMALL, {"seed": "x"}, (), "file1.yaml: seed: 'x'"),
        (SMALL, {"seed": 1}, ("--seed", "1", "--seed=2"), "--seed stands twice"),
        (SMALL, {"seed": 1}, ("--config", "nowhere.yaml"), "nowhere.yaml cannot be read"),
        (SMALL, {"seed": 1}, ("--config",), "--config takes one file"),
        (SMALL, {"seed": 1}, ("--config", "a.yaml", "b.yaml"), "--config takes one file"),
        (
            SMALL,
            {"seed": 1},
            ("--config=recipes/overlays/../demo.yaml", "--config", "recipes/demo.yaml"),
            "demo.yaml twice",
        ),
        (
            SMALL,
            {"model_name_or_path": "bases/smollm2"},
            (),
            "python demo/real_base.py makes bases/smollm2-135m-instruct",
        ),
    ],
)
def test_what_is_wrong_with_an_overlay_is_one_line(lay, first, over, words, named):
    with pytest.raises(UserError) as caught:
        lay(first, over, words=words)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_the_real_base_is_found_in_the_cache_and_in_the_users_own(lay, own_cache, tmp_path, monkeypatch):
    files = ["--config", "recipes/datasets/sgd.yaml", "--config", "recipes/overlays/real_base.yaml"]
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # a node's own disk is the cache of a cluster's job, the base lies at home
    for cache in (tmp_path / ".cache/carelm", own_cache):
        folder = cache / "bases/smollm2-135m-instruct"
        folder.mkdir(parents=True)
        recipe = load_recipe(files, usage="")
        assert recipe.base == str(folder) and recipe.bits is None and recipe.training["learning_rate"] == 2e-4
    assert recipe.keys()["model_name_or_path"] == "bases/smollm2-135m-instruct"


# Keys


def test_an_unknown_key_names_the_nearest_one(load):
    message = message_of(load, learning_rte=1e-3)
    assert "small.yaml" in message and "'learning_rte'" in message and "'learning_rate'" in message
    assert "'learning_rate'" in message_of(load, "--learning_rte", "1e-3")


def test_a_sweeps_file_is_told_from_a_recipe(load):
    assert "python train/sweep.py" in message_of(load, recipe="recipes/demo.yaml")


def test_what_asks_models_takes_no_adapter_to_go_on_from():
    with pytest.raises(UserError, match="--models FOLDER"):
        load_recipe(["--adapter", "outputs/shop"], usage="", first=("models",))


def test_an_abbreviated_key_is_refused_and_the_whole_one_named(load):
    assert "'learning_rate'" in message_of(load, "--learning", "1e-3")
    assert "'max_length'" in message_of(load, max_len=128)
    assert "'early_stopping_patience'" in message_of(load, "--early", "3")


def test_a_key_twice_in_the_file_names_both_lines(load, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("max_length: 128\nseed: 1\nmax_length: 256\n")
    with pytest.raises(UserError, match=r"twice\.yaml.*'max_length'.*line 1.*line 3"):
        load_recipe(["--config", str(path)], usage="")


def test_a_key_twice_on_the_command_line_is_refused(load):
    assert "--seed stands twice" in message_of(load, "--seed", "1", "--seed", "2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 10.7),
        ("max_steps", "ten"),
        ("max_steps", None),
        ("learning_rate", "fast"),
        ("global_batch_size", 2.5),
        ("global_batch_size", "16 "),
        ("load_in_4bit", "perhaps"),
        ("row_filter", "category"),
        ("trained_turns", "some"),
        ("seed", True),
    ],
)
def test_a_value_of_the_wrong_type_names_the_key_and_the_value(load, key, value):
    message = message_of(load, **{key: value})
    assert key in message and str(value) in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", "-1"),
        ("lora_r", "0"),
        ("max_steps", "0"),
        ("num_train_epochs", "0"),
        ("eval_steps", "0"),
        ("seed", "-1"),
        ("num_sample_answers", "-1"),
        ("learning_rate", "nan"),
        ("max_grad_norm", "inf"),
        ("temperature", "nan"),
        ("save_steps", "inf"),
        ("chunk_tokens", "0"),
        ("num_passages", "0"),
        ("dense_weight", "1.5"),
        ("answer_threshold", "-0.1"),
    ],
)
def test_a_number_that_makes_no_run_is_named(load, key, value):
    with pytest.raises(UserError, match=f"{key}: {value}"):
        load(f"--{key}", value)


def test_the_strategy_best_is_refused(load):
    assert "save_strategy: best" in message_of(load, "--save_strategy", "best")


@pytest.mark.parametrize(
    "key, value, near",
    [
        ("lr_scheduler_type", "cosin", "cosine"),
        ("eval_strategy", "stesp", "steps"),
        ("optim", "adamw_tortch", "adamw_torch"),
    ],
)
def test_a_value_of_an_enum_is_checked_without_torch(load, key, value, near):
    assert f"did you mean '{near}'?" in message_of(load, f"--{key}", value)


def test_a_key_of_the_launcher_is_sent_there(load):
    assert "belongs to the launcher" in message_of(load, "--num_processes", "2")


def test_a_choice_that_is_none_names_the_nearest_one(load):
    assert "did you mean 'prompt_tuning'" in message_of(load, method="prompt_tunning")


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refused_key_says_what_to_do_instead(load, key):
    assert REFUSED[key] in message_of(load, f"--{key}", "1")


def test_keys_that_a_refusal_recommends_are_known():
    for words in (
        "global_batch_size",
        "precision",
        "group_by_length",
        "trained_turns",
        "too_long",
        "chat_template_path",
    ):
        assert any(words in reason for reason in REFUSED.values())
        assert words in known_keys()


def test_a_number_written_as_2e_4_is_a_number(load, tmp_path):
    path = tmp_path / "number.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "learning_rate: 2e-4\n")
    assert load_recipe(["--config", str(path)], usage="").training["learning_rate"] == 2e-4
    assert load("--learning_rate", "2e-4").training["learning_rate"] == 2e-4


def test_what_looks_like_a_number_of_base_8_or_60_is_text(tmp_path):
    path = tmp_path / "zip.yaml"
    words = "01234, 12:30, 1_000, 0x1F, 007.5, 10, -1, 2.5, 1.0e-05"
    path.write_text(yaml.safe_dump(SMALL) + f"row_filter: {{zip: [{words}]}}\n")
    recipe = load_recipe(["--config", str(path)], usage="")
    assert recipe.row_filter == {"zip": ["01234", "12:30", "1_000", "0x1F", "007.5", 10, -1, 2.5, 1e-5]}


def test_a_key_with_one_dash_is_refused(load):
    assert "write --learning_rate" in message_of(load, "--max_length", "64", "-learning_rate", "1e-3")


def test_null_is_no_word_and_in_quotes_it_is(load):
    assert message_of(load, "--labels", "null", "x").startswith("--labels: one of its words is null")
    assert load("--labels", '"null"', "x").labels == load(labels=["null", "x"]).labels == ["null", "x"]


def test_the_command_line_overrides_the_file(load):
    recipe = load("--max_length", "64", "--split_seed=7", "--restart", max_length=128, split_seed=1)
    assert (recipe.max_length, recipe.split_seed, recipe.restart) == (64, 7, True)


def test_lists_and_dicts_can_be_given_on_the_command_line(load):
    recipe = load(
        *("--lora_target_modules", "q_proj", "v_proj"),
        *("--user_roles", "true"),
        *("--row_filter", '{"category": ["ORDER", "REFUND"], "lang": "en"}'),
    )
    assert recipe.model["lora_target_modules"] == ["q_proj", "v_proj"]
    assert recipe.user_roles == ["true"]
    assert recipe.row_filter == {"category": ["ORDER", "REFUND"], "lang": "en"}


def test_text_on_the_command_line_stays_text(load):
    recipe = load("--system_prompt", "2024: yes", "--dataset_name", "1")
    assert (recipe.system_prompt, recipe.dataset_name) == ("2024: yes", "1")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"prompt_template": None}, "prompt_template"),
        ({"messages_column": "messages"}, "messages_column"),
        ({"prompt_template": "no column"}, "prompt_template"),
        ({"prompt_template": "{question"}, "prompt_template"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"max_samples": 0}, "max_samples"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "validation_fraction"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit"),
        ({"load_in_4bit": True, "method": "full"}, "method"),
        ({"model_name_or_path": "./not_there"}, "model_name_or_path"),
        ({"user_roles": ["a", "b"], "assistant_roles": ["b"]}, "user_roles and assistant_roles both hold 'b'"),
    ],
)
def test_keys_that_contradict_each_other_are_named(load, keys, named):
    assert named in message_of(load, **keys)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "", "\xff"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(["--config", str(path)], usage="")


def test_a_recipe_that_is_not_there_is_named(load):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_recipe(["--config", "nowhere.yaml"], usage="")


# Speed


def test_help_lists_every_own_key_and_starts_without_torch():
    shown = subprocess.run([sys.executable, "train/sft.py", "--help"], cwd=PROJECT, capture_output=True, text=True)
    assert shown.returncode == 0
    for key in known_keys().values():
        if key.owner == "own":
            assert f"--{key.name}" in shown.stdout and (not key.help or key.help.split()[0] in shown.stdout)
    for key in ("learning_rate", "lora_r", "max_length"):
        assert f"--{key}" in shown.stdout
    assert "--deepspeed" not in shown.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        ("--load_in_4bit yes", "--load_in_4bit: 'yes' is not of type bool; write true or false"),
        ("--learning_rate small", "--learning_rate: 'small' is not of type float; give a number"),
        ("--max_steps 1.5", "--max_steps: 1.5 is not of type int; give a whole number"),
        ("--row_filter {mark: good}", """; on a command line it stands in quotes, as '{"key": "value"}'"""),
        (
            "--prompt_template question --completion_template {answer}",
            """write its name in braces, and all of it in quotes: "{column}\"""",
        ),
        (
            "--packing",
            "key 'packing' is not set in a recipe: a row stands by itself, so that a step has the same examples",
        ),
        ("--bits 4", "unknown key 'bits'; did you mean 'load_in_4bit'?"),
        ("--lr 1e-4", "unknown key 'lr'; did you mean 'learning_rate'?"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_with_what_to_write(words, said):
    with pytest.raises(UserError) as caught:
        load_recipe(words.split(), usage="")
    assert said in str(caught.value)


def test_what_others_call_a_key_leads_to_one_that_is_there():
    assert not {*MEANT} & {*known_keys()} and {*MEANT.values()} <= {*known_keys()} - {*REFUSED}


def test_latency_may_be_left_unmeasured_but_not_less():
    assert load_recipe(["--num_latency_prompts", "0"], usage="").num_latency_prompts == 0
    with pytest.raises(UserError, match="num_latency_prompts: -1 is below 0"):
        load_recipe(["--num_latency_prompts", "-1"], usage="")


def test_help_lists_a_commands_own_keys_first_and_each_key_once():
    def listed(first=()):
        return re.findall(r"^  --(\w+)|^(keys .*):$", format_help("", first), re.M)

    for first in ((), EVALUATION_KEYS):
        names = [name for name, _ in listed(first) if name]
        own = {name for name, key in known_keys().items() if key.owner == "own"}
        assert len(names) == len({*names}) and own <= {*names}
    assert [name or title for name, title in listed(("models", "top_p"))][:5] == [
        "keys of this command", "config", "models", "top_p", "output_dir"
    ]  # fmt: skip
    titles = [title for _, title in listed() if title]
    assert titles[0] == "keys that most recipes set" and titles[-1] == "keys that the evaluation reads (eval/run.py)"
    places = {name: i for i, (name, _) in enumerate(listed())}
    assert places["preview"] < places["dataset_name"] < places["learning_rate"] < places["lora_r"] < places["num_shots"]
    assert "initialization" not in format_help("")  # TRL's word for the base


def test_a_runs_own_recipe_is_called_as_its_folder(load, tmp_path):
    save_recipe(load(output_dir=str(tmp_path / "shop")), tmp_path / "recipe.yaml")
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage="").name == tmp_path.name
    (tmp_path / "recipe.yaml").write_text("messages_column: messages\n")
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage="").name == "recipe"


def test_what_only_a_training_takes_is_not_in_the_words_of_the_next_command(load, tmp_path):
    recipe = load(output_dir=str(tmp_path / "shop"))
    words = ["--config", "a.yaml", "--restart", "--models", "base", "adapter", "--seed=3", "--labels", "yes", "no"]
    assert words_of(recipe, words) == ["--config", "a.yaml", "--seed=3", "--labels", "yes", "no"]
    assert words_of(recipe, ["--adapter", "old"]) == ["--config", str(tmp_path / "shop/recipe.yaml")]


def test_braces_without_quotes_are_told_so(tmp_path):
    (tmp_path / "shop.yaml").write_text("prompt_template: {question}\n")
    with pytest.raises(UserError, match="prompt_template: .*a text that begins with { stands in quotes"):
        load_recipe(["--config", str(tmp_path / "shop.yaml")], usage="")


def test_what_checks_a_recipe_and_its_data_imports_no_torch():
    modules = (
        "carelm.recipe_file, carelm.training.prepared, carelm.training.preview, carelm.ranks, carelm.training.runs"
    )
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert shown.stdout.strip() == "False", shown.stderr


def test_the_types_of_others_keys_are_those_of_the_installed_classes():
    assert known_keys()["learning_rate"].annotation == "float"
    assert known_keys()["lora_r"].owner == "model"
    assert known_keys()["max_length"].owner == "training"
    assert known_keys()["max_steps"].annotation == "int"


# The saved recipe and the run's identity


def test_a_saved_recipe_reloads_to_the_same_run(load, tmp_path):
    first = load(
        "--output_dir", "out", learning_rate="2e-4", row_filter={"lang": "en"}, system_prompt="Grüße: {question}"
    )
    save_recipe(first, tmp_path / "recipe.yaml")
    again = load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage="")
    assert again.keys() == first.keys()
    check_identity(again, tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_reloads_to_the_same_run(path, tmp_path):
    first = load_recipe(["--config", str(path)], usage="")
    save_recipe(first, tmp_path / "recipe.yaml")
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage="").keys() == first.keys()


@pytest.mark.parametrize("key", ["restart", "preview", "rate"])
def test_what_is_meant_once_stands_in_no_file(load, key):
    """A job that is put back in the queue would begin anew each time."""
    assert f"small.yaml: {key} is meant once" in message_of(load, **{key: 1 if key == "preview" else True})
    assert not getattr(load(**{key: 0 if key == "preview" else False}), key)


def test_the_saved_recipe_holds_no_token_and_nothing_that_is_meant_once(load, tmp_path):
    recipe = load("--hub_token", "hf_secret", "--restart", "--preview", "2", "--rate")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert "hf_secret" not in text and "hub_token" not in text
    assert "restart" not in text and "preview" not in text and "\nrate" not in text
    assert "hf_secret" not in json.dumps(recipe.keys())


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3},
        {"global_batch_size": 8},
        {"dataset_name": "other.jsonl"},
        {"seed": 1},
        {"lora_r": 4},
        {"max_length": 77},
        {"weight_decay": 0.1},
        {"system_prompt": "Be brief."},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_folder_with_another_run_is_refused_and_the_key_named(load, tmp_path, changed):
    save_recipe(load(), tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=next(iter(changed))) as caught:
        check_identity(load(**changed), tmp_path / "recipe.yaml")
    assert "--restart" in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_steps": 5},
        {"num_train_epochs": 3},
        {"logging_steps": 5},
        {"per_device_train_batch_size": 2},
        {"output_dir": "elsewhere"},
        {"save_steps": 5},
        {"gradient_checkpointing": True},
        {"documents": ["manuals"], "chunk_tokens": 100, "retriever": "bm25"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_run_may_go_on_elsewhere_longer_and_in_other_micro_batches(load, tmp_path, changed):
    save_recipe(load(), tmp_path / "recipe.yaml")
    check_identity(load(**changed), tmp_path / "recipe.yaml")


def test_it_is_the_same_run_from_which_folder_it_is_ever_started(tmp_path, monkeypatch):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/rows.csv").write_text("question,answer\na,b\n")
    (tmp_path / "shop/shop.yaml").write_text("dataset_name: rows.csv\nmessages_column: messages\n")
    saved, found = {}, {}
    for folder, name in ((tmp_path / "shop", "shop.yaml"), (tmp_path, "shop/shop.yaml")):
        monkeypatch.chdir(folder)
        found[name] = load_recipe(["--config", name, "--output_dir", str(tmp_path / "run")], usage="")
        saved[name] = tmp_path / f"{folder.name}.yaml"
        save_recipe(found[name], saved[name])
        for recipe in found.values():
            for file in saved.values():
                check_identity(recipe, file)


def test_a_file_named_from_its_folder_is_the_one_named_by_its_whole_path(load, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = load(dataset_name=str(tmp_path / "rows.jsonl"))
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(recipe.keys() | {"dataset_name": "rows.jsonl"}))
    monkeypatch.chdir(tmp_path)
    check_identity(recipe, tmp_path / "saved.yaml")


def test_a_key_written_with_its_default_is_the_same_run(load, tmp_path):
    save_recipe(load(), tmp_path / "recipe.yaml")
    check_identity(load(weight_decay=0.0, lora_r=16, learning_rate="2e-4"), tmp_path / "recipe.yaml")
