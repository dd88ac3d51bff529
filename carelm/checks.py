"""What can be wrong between the keys of a recipe, found without torch and without data."""

import os
import re

from carelm.answer_checks import parse_checks
from carelm.data.masking import check_personal
from carelm.data.tags import check_tags, used_tags
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.files import REAL_BASE
from carelm.keys import ALTERNATIVES, LORA_KEYS
from carelm.recipe import Recipe


def check(recipe: Recipe) -> None:
    """What can be wrong between keys, found without torch."""
    for key in ("global_batch_size", "num_virtual_tokens", "sample_max_new_tokens", "max_new_tokens", "max_batch_tokens",
                "num_resamples", "max_queue", "answer_timeout", "max_body_bytes", "chunk_tokens", "num_passages",
                "judge_samples", "judge_max_tokens"):  # fmt: skip
        if getattr(recipe, key) < 1:
            raise UserError(f"{key}: {getattr(recipe, key)} is not at least 1")
    for key in ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if recipe.training.get(key, 1) is None or recipe.training.get(key, 1) < 1:
            raise UserError(f"{key}: {recipe.training[key]} is not at least 1")
    if recipe.stall_timeout < 0:
        raise UserError(f"stall_timeout: {recipe.stall_timeout} is below 0; 0 is for never")
    if recipe.max_hours is not None and recipe.max_hours <= 0:
        raise UserError(f"max_hours: {recipe.max_hours} is not above 0; leave it out for no limit")
    for key in ("max_samples", "max_eval_samples", "early_stopping_patience"):
        if getattr(recipe, key) is not None and getattr(recipe, key) < 1:
            raise UserError(f"{key}: {getattr(recipe, key)} is not at least 1; leave it out for no limit")
    given = recipe.keys()
    for ways in ALTERNATIVES:
        named = [key for way in ways if (key := next(filter(given.get, way), None))]
        if len(named) > 1:
            raise UserError(f"{named[0]} and {named[1]}: set only one of them")
    for key in (
        "learning_rate",
        "beta",
        "lora_r",
        "lora_alpha",
        "num_train_epochs",
        "logging_steps",
        "eval_steps",
        "save_steps",
    ):
        if given.get(key) is not None and given[key] <= 0:
            raise UserError(f"{key}: {given[key]} is not above 0")
    for key in ("warmup_steps", "weight_decay", "max_grad_norm", "lora_dropout", "seed", "data_seed", "split_seed",
                "answer_weight", "num_shots", "temperature", "num_sample_answers", "num_latency_prompts",
                "dataloader_num_workers", "port", "certify"):  # fmt: skip
        if given.get(key) is not None and given[key] < 0:
            raise UserError(f"{key}: {given[key]} is below 0")
    if recipe.engine not in ("batcher", "vllm"):
        raise UserError(f"engine: '{recipe.engine}' is neither batcher nor vllm")
    if recipe.engine_url and recipe.engine != "vllm":
        raise UserError("engine_url: it is for engine: vllm; set that too")
    for origin in recipe.cors_origins:
        if not re.fullmatch(r"https?://[^/*\s]+/?", origin):
            raise UserError(f"cors_origins: {origin!r} is no web page's origin; write each as https://shop.example")
    if recipe.port > 65535:
        raise UserError(f"port: {recipe.port} is above 65535")
    if (given.get("lora_dropout") or 0) >= 1:
        raise UserError(f"lora_dropout: {given['lora_dropout']} is not below 1")
    if given.get("max_steps", 1) < 1 and given["max_steps"] != -1:
        raise UserError(f"max_steps: {given['max_steps']} is not at least 1; leave it out to train num_train_epochs")
    if given.get("logging_nan_inf_filter"):
        raise UserError("logging_nan_inf_filter: a loss that is not finite ends the run; leave it out")
    if given["report_to"] is None:
        raise UserError("report_to: it names no tracker; write none")
    if both := {*recipe.user_roles} & {*recipe.assistant_roles}:
        raise UserError(f"user_roles and assistant_roles both hold {min(both)!r}; a role is one of the two")
    labels = [" ".join(label.split()) for label in recipe.labels]
    if "" in labels or "unparsable" in labels or len(set(labels)) < len(labels):
        raise UserError(f"labels: {recipe.labels}: each needs a name of its own that is neither empty nor 'unparsable'")
    if recipe.primary_metric.endswith(("accuracy", "macro_f1")) and not recipe.labels:
        raise UserError(f"primary_metric: {recipe.primary_metric} needs labels; list them, e.g. labels: [yes, no]")
    if recipe.judge_decides and not recipe.judge:
        raise UserError("judge_decides: there is no judge; name one in judge, as the endpoint at judge_url calls it")
    parse_checks(recipe.checks)
    check_tags(recipe)
    check_personal(recipe)
    if recipe.overlap_columns and (len(recipe.overlap_columns) != 2 or len(recipe.labels) != 2):
        raise UserError(
            f"overlap_columns: {len(recipe.overlap_columns)} columns and {len(recipe.labels)} labels; it takes two of each"
        )
    if len(labels) == 1:
        raise UserError(f"labels: {labels[0]!r} is the only one, so that every answer has it; list two at least")
    for key in ("validation_fraction", "test_fraction", "max_empty_share", "top_p", "dense_weight", "answer_threshold"):
        if not 0 <= (getattr(recipe, key) or 0) <= 1:
            raise UserError(f"{key}: {getattr(recipe, key)} is not between 0 and 1")
    if recipe.validation_fraction + recipe.test_fraction >= 1:
        raise UserError("validation_fraction and test_fraction leave nothing to train on; their sum must be under 1")
    if recipe.method == "full" and recipe.bits:
        raise UserError(
            f"method: full cannot train a base held in {recipe.bits} bits; set method: lora, or "
            f"load_in_{recipe.bits}bit: false"
        )
    _check_lora(recipe)
    if recipe.adapter == "":
        raise UserError("adapter: it names no folder; leave it out to begin with a new one")
    if recipe.adapter and recipe.method == "full":
        raise UserError("adapter: method: full trains no adapter; leave out one of the two")
    for number, question in enumerate(recipe.card_questions, 1):
        if not question.strip() or question in recipe.card_questions[: number - 1]:
            what = "stands there twice" if question.strip() else "is empty"
            raise UserError(f"card_questions: question {number} {what}; remove it")
    smoothing = recipe.training.get("label_smoothing_factor") or 0
    if not 0 <= smoothing < 1:
        raise UserError(f"label_smoothing_factor: {smoothing} is not at least 0 and below 1")
    if bool(recipe.prompt_template) != bool(recipe.completion_template):
        there, missing = ("prompt", "completion") if recipe.prompt_template else ("completion", "prompt")
        raise UserError(f"{there}_template is set and {missing}_template is not: they go together")
    if not any(given.get(key) for way in ALTERNATIVES[0] for key in way):
        raise UserError(
            "the recipe does not say where the conversations are: set prompt_template and completion_template (such as "
            '"{instruction}" and "{response}"), or messages_column; or text_column, role_column and conversation_column '
            "where each row is one message"
        )
    _check_preferences(recipe)
    if any(given.get(key) for key in ALTERNATIVES[0][2]):
        _check_one_message_a_row(recipe)
    in_templates = []
    for key in ("system_prompt", "prompt_template", "completion_template", "rejected_template"):
        if getattr(recipe, key) is not None:
            columns = template_columns(getattr(recipe, key), key)
            if key != "system_prompt" and not columns:
                raise UserError(
                    f"{key}: {getattr(recipe, key)!r} names no column; write its name in braces, and all of it in quotes: "
                    '"{column}" (outside of them # begins a comment)'
                )
            in_templates += columns
    for column in recipe.optional_columns:
        if column not in in_templates:
            there = ", ".join(dict.fromkeys(in_templates)) or "none"
            raise UserError(f"optional_columns: '{column}' is no column of the templates (theirs: {there})")
    _check_predicted(recipe)
    if recipe.training["save_strategy"] == "best":
        raise UserError(
            "save_strategy: best is not there; set steps, epoch or no (early_stopping_patience keeps the best checkpoint)"
        )
    if recipe.early_stopping_patience and recipe.training["eval_strategy"] == "no":
        raise UserError("early_stopping_patience needs evaluations: set eval_strategy: steps or epoch")
    if recipe.early_stopping_patience:  # the best checkpoint can only be kept where one is saved at each evaluation
        every = recipe.training.get("eval_steps") or recipe.training["logging_steps"]
        follow = {"save_strategy": recipe.training["eval_strategy"]}
        if recipe.training["eval_strategy"] == "steps":
            follow |= {"eval_steps": every, "save_steps": every}
        recipe.training.update(follow)
    base = recipe.model["model_name_or_path"]
    if base.startswith((".", "/", "~")) and not os.path.isdir(recipe.base):
        raise UserError(f"model_name_or_path: there is no folder {base}")
    if base.startswith("bases/") and not os.path.isdir(recipe.base):
        raise UserError(
            f"model_name_or_path: {base} is not in CareLM's cache; `make real-base` or python demo/real_base.py makes "
            f"{REAL_BASE}"
        )


def _check_preferences(recipe: Recipe) -> None:
    for key in ("prompt_column", "rejected_column"):
        if getattr(recipe, key) and not recipe.messages_column:
            raise UserError(f"{key}: set messages_column too, the column with the answer")
    if recipe.rejected_template and not recipe.prompt_template:
        raise UserError("rejected_template: set prompt_template and completion_template too, for the better answer")
    named = next((key for key in ("rejected_template", "rejected_column") if getattr(recipe, key)), None)
    if recipe.objective != "preferences":
        if named:
            raise UserError(f"{named}: it is for objective: preferences; set that, or leave it out")
        return
    if recipe.text_column:
        raise UserError(
            "objective: preferences takes rows with two answers each; leave out text_column, and set prompt_template, "
            "completion_template and rejected_template, or messages_column and rejected_column"
        )
    missing = "rejected_column" if recipe.messages_column else "rejected_template"
    if not getattr(recipe, missing):
        raise UserError(f"objective: preferences needs {missing}, which says where the worse answer is")
    if recipe.method == "prompt_tuning":
        raise UserError("objective: preferences does not train by method: prompt_tuning; set method: lora or full")
    if recipe.trained_turns == "all":
        raise UserError(
            "trained_turns: all is for objective: answers; of a pair the last answers are compared: leave it out"
        )
    if recipe.too_long == "cut":
        raise UserError(
            "too_long: cut is for objective: answers, as an answer that is cut is not the one that was judged; leave it out"
        )
    if recipe.training.get("label_smoothing_factor"):
        raise UserError("label_smoothing_factor: it is for objective: answers; leave it out")
    if recipe.also_train:
        raise UserError(
            "also_train: it is for objective: answers; leave it out, or put all pairs into the recipe's data"
        )


def _check_one_message_a_row(recipe: Recipe) -> None:
    if not recipe.text_column:
        raise UserError("text_column is not set: the column with the message's text, where a row is one message")
    if not recipe.role_column:
        raise UserError("text_column: set role_column too, the column with who wrote the message")
    if not (recipe.conversation_column or recipe.reply_to_column):
        raise UserError(
            "text_column: set conversation_column, the column that is the same in all messages of a conversation, or "
            "reply_to_column"
        )
    if recipe.date_order and not recipe.order_column:
        raise UserError("date_order: set order_column too, the column with the dates")
    if recipe.reply_to_column and not recipe.id_column:
        raise UserError("reply_to_column: set id_column, the column with the message's own id that replies name")


def _check_predicted(recipe: Recipe) -> None:
    columns = template_columns(recipe.prompt_template or "", "prompt_template")
    for column, place in recipe.predicted_columns.items():
        if not isinstance(place, str) or not place.strip():
            raise UserError(
                f"predicted_columns: {column}: {place!r} is no folder or file; gold takes the data's own values"
            )
        if column not in columns:
            raise UserError(
                f"predicted_columns: '{column}' is no column of prompt_template (its: {', '.join(columns) or 'none'})"
            )
        if column in used_tags(recipe) or column == recipe.tag_column:
            raise UserError(f"predicted_columns: '{column}' is a tag, or what tags are made of; leave it out")
        for key in ("system_prompt", "completion_template"):
            if column in template_columns(getattr(recipe, key) or "", key):
                raise UserError(
                    f"predicted_columns: '{column}' stands in {key} too; it can stand in prompt_template alone"
                )
    if recipe.predicted_columns and not {*columns} - {*recipe.predicted_columns, *used_tags(recipe)}:
        raise UserError("predicted_columns: prompt_template has no other column; nothing of a question would be left")


def _check_lora(recipe: Recipe) -> None:
    for key in LORA_KEYS:
        default = Recipe.__dataclass_fields__[key].default
        if getattr(recipe, key) != default and recipe.method != "lora":
            leave_out = f"{key}: {default or 'null'} leaves it out"
            raise UserError(f"{key}: it is for method: lora, and this is {recipe.method}; {leave_out}")
    if recipe.layers_to_transform == []:
        raise UserError("layers_to_transform: it names no layer; leave it out for all")
    if recipe.layers_pattern and recipe.layers_to_transform is None:
        raise UserError("layers_pattern: set layers_to_transform too, the numbers of the layers")
    if recipe.layers_to_transform and recipe.model.get("lora_target_parameters"):
        raise UserError(
            "layers_to_transform and lora_target_parameters: PEFT would take these of all layers; set only one"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, number in (getattr(recipe, key) or {}).items():
            if not isinstance(pattern, str) or type(number) is not int or number < 1:
                raise UserError(f"{key}: {pattern!r}: {number!r} is no module with a whole number of at least 1")
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern", "exclude_modules", "lora_target_modules"):
        for pattern in recipe.keys().get(key) or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{key}: '{pattern}' is no regular expression ({error})") from None
    if recipe.init_lora_weights == "orthogonal":
        if recipe.model.get("lora_target_parameters"):
            raise UserError("init_lora_weights: orthogonal is for modules; leave out lora_target_parameters")
        ranks = {"lora_r": recipe.model.get("lora_r", 16), **(recipe.rank_pattern or {})}
        if odd := [name for name, r in ranks.items() if r % 2]:
            raise UserError(f"init_lora_weights: orthogonal needs even ranks, and {odd[0]} has {ranks[odd[0]]}")
