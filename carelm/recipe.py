"""The recipe: what one complete run is. Imports no torch."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carelm.errors import UserError
from carelm.files import OWN_CACHE, cache, locate

ONCE = ("restart", "preview", "rate", "certify")  # meant for one start: on the command line alone
CHATS = "chats"  # in the output folder: what was said in train/chat.py, where /save names no other place
ANSWERS = "answers"  # there too: what models have said for train/make_pairs.py and train/add_column.py
FEEDBACK = "feedback.jsonl"  # there too: what people thought of serve/run.py's answers
CERTIFIED = "serving_certificate.json"  # there too: how serve/run.py --certify has found its answers
ENGINE_LOG = "vllm.log"  # there too: what vLLM has printed
REFERENCE = "reference.npz"  # there too: what the model that a run of preferences began as says to its pairs
PRECISION_NOTE = "precision.json"  # in the output folder: what `precision: auto` has measured on a CPU, and chosen


def _key(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Recipe:
    """One run. The fields are CareLM's own keys; `training` and `model` hold the keys of SFTConfig and ModelConfig."""

    # method and budget
    method: str = _key("lora", "What is trained.", ("lora", "full", "prompt_tuning"))
    objective: str = _key(
        "answers",
        "What is learnt: the answers of the rows, or which of two answers is preferred (DPO).",
        ("answers", "preferences"),
    )
    beta: float = _key(
        0.1, "How closely the model stays to the one that it began as (objective: preferences); higher is closer."
    )
    answer_weight: float = _key(
        0.0, "Weight of the preferred answer's own loss per token, added to that of the preference."
    )
    precision: str = _key(
        "auto",
        "auto: bf16 on GPUs of compute capability 8.0 and newer, fp16 on older ones; on a CPU bf16 where its products are at "
        "least twice as fast as fp32's, else fp32: measured at the run's first start and kept in output_dir.",
        ("auto", "bf16", "fp16", "fp32"),
    )
    global_batch_size: int = _key(
        16, "Examples in one optimizer step over all ranks; gradient accumulation follows from it."
    )
    group_by_length: bool = _key(True, "Batch examples of like length; the groups depend on batch and seed alone.")
    num_virtual_tokens: int = _key(20, "Length of the trained prompt (method: prompt_tuning).")
    prompt_tuning_init_text: str | None = _key(None, "Text whose embeddings the trained prompt starts from.")
    adapter: str | None = _key(
        None,
        "Folder of an adapter that the run goes on from, on this recipe's rows: it decides method, rank, alpha and modules.",
    )
    layers_to_transform: list[int] | None = _key(None, "Layers that LoRA changes, by number from 0 (default: all).")
    layers_pattern: list[str] | None = _key(
        None, "What the base calls its list of layers, where it has several (layers, h): goes with layers_to_transform."
    )
    exclude_modules: list[str] | None = _key(
        None, "Modules that LoRA leaves as they are, by the end of their names or by one expression."
    )
    rank_pattern: dict[str, int] | None = _key(
        None, "Modules with another rank than lora_r, by the end of their names or an expression: {q_proj: 8}."
    )
    alpha_pattern: dict[str, int] | None = _key(None, "The same for lora_alpha.")
    init_lora_weights: str = _key(
        "true",
        "How LoRA's weights are drawn; the base's answers are the same before the first step. (PEFT's others change the base, "
        "or need data.)",
        ("true", "gaussian", "orthogonal"),
    )
    early_stopping_patience: int | None = _key(
        None, "Stop after this many evaluations in a row without a lower eval loss, and keep the best."
    )
    num_sample_answers: int = _key(3, "Validation prompts that are answered at each evaluation, for TensorBoard.")
    sample_max_new_tokens: int = _key(64, "Longest such answer, in tokens.")
    # data
    dataset_name: str = _key(
        "demo/data", "A .jsonl, .json, .csv, .tsv or .parquet file (.gz too), a folder, a glob, or a Hub id."
    )
    dataset_config: str | None = _key(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = _key("train", "Name of the split to train on (training is taken for it too).")
    dataset_validation_split: str = _key(
        "validation", "Name of the split for the eval loss (valid, val, dev and eval are taken for it too)."
    )
    dataset_test_split: str = _key("test", "Name of the split kept for the evaluator (testing is taken for it too).")
    validation_fraction: float = _key(
        0.05, "Share of the train split to hold out where the data has no validation split."
    )
    test_fraction: float = _key(0.1, "Share of the train split to hold out where the data has no test split.")
    split_seed: int = _key(42, "Seed of these shares and of max_samples.")
    max_samples: int | None = _key(None, "Use at most this many training rows, drawn by split_seed.")
    max_eval_samples: int | None = _key(None, "Use at most this many validation rows, and as many test rows.")
    also_train: dict[str, Any] | None = _key(
        None,
        "Recipes (or RECIPE=DATA) whose rows are trained on too, with how many of them: {recipes/shop.yaml: 500}, all, or all "
        "of them 3 times; each is mapped by its own data keys, validation and test stay this recipe's.",
    )
    row_filter: dict[str, Any] | None = _key(None, "Keep rows by column: {category: [ORDER, REFUND], lang: en}.")
    system_prompt: str | None = _key(
        None, "System message of every conversation that has none; {column} is filled in, {{ is a brace."
    )
    prompt_template: str | None = _key(None, 'The user message, e.g. "{instruction}".')
    completion_template: str | None = _key(None, 'The answer, e.g. "{response}".')
    rejected_template: str | None = _key(
        None, 'The worse answer to the same prompt (objective: preferences), e.g. "{rejected}".'
    )
    optional_columns: list[str] = _key(
        [], "Columns of the templates that may be empty in a row; any other empty one counts like an empty answer."
    )
    predicted_columns: dict[str, str] = _key(
        {},
        "Columns of prompt_template that a new question does not have: in test rows their value is what another run has "
        "answered in its evaluation, {intent: outputs/intents} or a predictions-MODEL.jsonl there; gold is the data's own.",
    )
    tag_column: str | None = _key(
        None,
        "Column with the customer's words: {priority} and {sentiment} in the templates are then tags of them, not columns.",
    )
    urgent_words: list[str] = _key(
        [], "{priority} is HIGH where one of these stands in the customer's words, else NORMAL."
    )
    messages_column: str | None = _key(None, "Column with a list of messages, instead of the two templates.")
    rejected_column: str | None = _key(
        None,
        "Column with the worse answer, or the conversation that ends with it, beside a messages_column with the better one "
        "(objective: preferences).",
    )
    prompt_column: str | None = _key(
        None, "Column with the messages, or the question, before those of messages_column and rejected_column."
    )
    role_key: str | None = _key(None, "Key of a message's role (default: role, from or speaker).")
    content_key: str | None = _key(None, "Key of a message's text (default: content, value, utterance or text).")
    user_roles: list[str] = _key([], "Values of the role that mean the user, where they are unusual.")
    assistant_roles: list[str] = _key([], "Values of the role that mean the assistant, where they are unusual.")
    tools_column: str | None = _key(
        None, 'Column with the tools that the model may call (default, beside messages: tools or functions; "": none).'
    )
    text_column: str | None = _key(
        None, "Column with the text of one message, where a row is one: goes with role_column and conversation_column."
    )
    role_column: str | None = _key(None, "Column with who wrote the message: see user_roles and assistant_roles.")
    conversation_column: str | None = _key(None, "Column that is the same in all messages of a conversation.")
    order_column: str | None = _key(
        None, "Column with the number or date that orders a conversation's messages (default: as they stand)."
    )
    date_order: str | None = _key(
        None,
        "What stands first in dates of order_column such as 03/04/2026 (default: what its other dates show; dots have the day "
        "first).",
        ("day_first", "month_first"),
    )
    reply_to_column: str | None = _key(
        None, "Column with the id (id_column) of the message that this one replies to, instead of order_column."
    )
    strip_html: bool = _key(
        False, "Make plain text of HTML, in all rows, in evaluation and in chat; without it rows with HTML are counted."
    )
    mask_personal_data: bool = _key(
        False,
        "Put [EMAIL], [PHONE], [CARD] and [IBAN] in the place of such data, in all rows, in evaluation and in chat; without it "
        "they are counted.",
    )
    phone_region: str | None = _key(
        None, 'Country whose phone numbers are known without a + in front, as two letters (DE, US, IN; "NO" in quotes).'
    )
    trained_turns: str = _key("last", "Which assistant turns carry loss.", ("last", "all"))
    category_column: str | None = _key(None, "Column with the category, for scores by category.")
    id_column: str | None = _key(None, "Column with the row's id (default: conversation_column or file:row).")
    too_long: str = _key(
        "drop",
        "A row that is still over max_length once its old turns are gone: drop it, or cut its prompt and answer.",
        ("drop", "cut"),
    )
    max_empty_share: float = _key(0.1, "Stop when more than this share of the rows has no answer or an empty column.")
    keep_test_questions: bool = _key(False, "Leave questions that also stand in validation or test in train.")
    drop_near_duplicates: bool = _key(
        False,
        "Take questions out of train that are nearly one of validation or test (0.9 of their character 5-grams shared); "
        "they are counted and named in any case.",
    )
    # the evaluator
    models: list[str] = _key(
        [],
        "What is compared: base, adapter, merged, folders, or api:NAME; NAME@4bit, @8bit, @bf16, @fp16 or @fp32 holds one "
        "otherwise (default: base, the run's result, and its merge where it is there).",
    )
    api_url: str | None = _key(
        None,
        "Address of an OpenAI-compatible endpoint, such as https://api.openai.com/v1, whose models are api:NAME; the key is "
        "read from OPENAI_API_KEY.",
    )
    num_shots: int = _key(0, "Training examples that stand in front of every prompt, drawn by split_seed.")
    max_new_tokens: int = _key(256, "Longest answer, in tokens.")
    max_batch_tokens: int = _key(
        65536,
        "Tokens of one batch, prompts and answers with padding: fewer where they would take more than an eighth of the "
        "memory; halved where memory ends.",
    )
    temperature: float = _key(0.0, "0 takes the likeliest token; above it answers are drawn by `seed`.")
    top_p: float = _key(1.0, "Draw from the likeliest tokens that make up this probability.")
    reference_columns: list[str] = _key(
        [],
        "Columns of the test rows that hold references, where there are several: the best one counts. One of them "
        "that completion_template names stands there for each.",
    )
    labels: list[str] = _key(
        [],
        "The labels that answers end with, for accuracy, macro F1 and the confusion table; of two the first is positive. "
        "Where completion_template ends in the label, each is also scored by its probability.",
    )
    overlap_columns: list[str] = _key(
        [], "Two text columns whose word overlap is a baseline for two labels: the more words they share, the first."
    )
    primary_metric: str = _key(
        "rougeL",
        "The score that decides which model is better.",
        (
            "rouge1",
            "rouge2",
            "rougeL",
            "rougeLsum",
            "bleu",
            "chrf",
            "exact_match",
            "accuracy",
            "macro_f1",
            "constrained_accuracy",
            "constrained_macro_f1",
        ),
    )
    also_test: list[str] = _key(
        [],
        "Recipes whose test questions the models answer too: data (or RECIPE=DATA), references, labels, checks, lengths and "
        "primary_metric are theirs; the smaller max_eval_samples counts.",
    )
    checks: list[dict[str, Any]] = _key(
        [],
        "Regular expressions over every answer: {name, pattern, when: over the question, must: false for one that is not to "
        "match}; (?P=order) in a pattern is what (?P<order>...) in when has matched.",
    )
    num_resamples: int = _key(1000, "Resamples of the test conversations for the intervals.")
    num_latency_prompts: int = _key(
        50, "Prompts that are timed one at a time (all, where there are fewer); 0: no latency is measured."
    )
    rate: bool = _key(
        False,
        "Write rate.html too: blind pairs of answers to rate by hand; the file that it saves counts in the next report.",
    )
    judge: str | None = _key(
        None,
        "Model that judges the answers, as the endpoint at judge_url calls it: each by four criteria, and every two of them "
        "against each other in both orders.",
    )
    judge_url: str | None = _key(
        None,
        "Address of the judge's OpenAI-compatible endpoint (default: api_url); the key is read from JUDGE_API_KEY, or from "
        "OPENAI_API_KEY where api_url names no other endpoint.",
    )
    judge_samples: int = _key(100, "Test questions whose answers are judged, drawn by split_seed.")
    judge_max_tokens: int = _key(512, "Longest reply of the judge, in tokens, its hidden reasoning included.")
    judge_decides: bool = _key(
        False, "The judge's preference is the answer of the report; otherwise it stands beside primary_metric's."
    )
    # serving
    host: str = _key("127.0.0.1", "Address that serve/run.py listens at; one that others reach needs a key of the API.")
    port: int = _key(8000, "Port that it listens at; 0 takes a free one.")
    api_key_file: str | None = _key(
        None, "File with the key that clients must send; without it CARELM_API_KEY of the environment, if it is set."
    )
    cors_origins: list[str] = _key(
        [], "Web pages elsewhere that may ask the API, as https://shop.example: none but its own otherwise."
    )
    max_queue: int = _key(128, "Requests that may wait or be answered at once; one more is told to come again (429).")
    answer_timeout: int = _key(300, "Seconds that one request may take, waiting included.")
    max_body_bytes: int = _key(2**20, "Largest body of a request, in bytes.")
    certify: int = _key(
        0, "Ask so many test questions through the API and by the evaluation's way, compare the answers, and exit."
    )
    engine: str = _key(
        "batcher",
        "What answers: batcher, in serve/run.py's own process, or vllm, which is started, watched and stopped.",
    )
    engine_command: str = _key(
        "vllm",
        "For engine: vllm, the program and what is added to its `vllm serve`: /opt/vllm/bin/vllm --enforce-eager",
    )
    engine_url: str | None = _key(
        None,
        "For engine: vllm, one that runs already, as http://gpu-box:8000; its key is VLLM_API_KEY of the environment.",
    )
    # retrieval
    documents: list[str] = _key(
        [],
        "What passages are cut from: files, folders or globs of PDF, DOCX, HTML, Markdown, text, and of rows (CSV, JSONL), "
        "each of which is a document.",
    )
    passage_template: str | None = _key(
        None, 'The text of such a row, e.g. "{Brand} {Model}: {Description}" (default: its columns, one a line).'
    )
    product_column: str | None = _key(None, "Column of such rows with the product that they are about.")
    title_column: str | None = _key(None, "Column of such rows with their title.")
    filter_columns: list[str] = _key(
        [], "Columns of such rows that a search can be narrowed to a value of; product is always one."
    )
    chunk_tokens: int = _key(200, "Tokens of a passage at most, by the base's tokenizer.")
    index: str | None = _key(None, "Folder of the index (default: index in output_dir).")
    embedder: str = _key(
        "auto",
        "A sentence-transformers model, as a folder or Hub id; auto: embedders/all-minilm-l6-v2 of CareLM's cache, which "
        "demo/embedder.py makes.",
    )
    retriever: str = _key(
        "hybrid", "How passages are found: by words, by meaning, or by both.", ("bm25", "dense", "hybrid")
    )
    dense_weight: float = _key(0.85, "Share of the meaning in a hybrid score; the rest is the words'.")
    num_passages: int = _key(4, "Passages that are put in front of a question.")
    answer_threshold: float | None = _key(
        None, "Say that one does not know where the best passage's confidence (0 to 1) is below this."
    )
    tickets: str | None = _key(
        None,
        "A recipe whose training rows are past tickets: its prompt is the question, its completion the resolution.",
    )
    matcher: str | None = _key(
        None, "Folder of a finished ticket-matching run, which says whether two tickets are the same."
    )
    gold_passages: dict[str, str] = _key(
        {},
        "For eval/retrieval.py, when a passage is right for a test row: a column of the passage (or document, page, product, "
        "id) and the row's column that has the same value, {page: page}, {intent: intent}.",
    )
    # the model card
    card_notes: str | None = _key(
        None, "Text that stands on top of the model card, as Markdown: what it is for, its data, its limits."
    )
    card_questions: list[str] = _key(
        [],
        "Questions that the finished model answers once, greedily, in at most max_new_tokens; the answers stand in the model "
        "card and in train_metrics.json.",
    )
    # the run
    max_hours: float | None = _key(None, "Save and stop in time to be done after this many hours from the launch.")
    stall_timeout: int = _key(
        1800,
        "Seconds without a step or an answer, loading included, after which a rank writes its stacks and ends; 0: never.",
    )
    restart: bool = _key(False, "Begin anew; an earlier run in output_dir is renamed, never deleted.")
    preview: int = _key(0, "Print this many rendered examples with the trained tokens marked, and exit.")

    name: str = ""
    mixed: dict[str, "Recipe"] = field(default_factory=dict)  # those of also_train, by their names there
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])

    @property
    def max_length(self) -> int:
        return self.training["max_length"]

    @property
    def virtual_tokens(self) -> int:
        """Positions that a trained prompt takes, 0 of other methods."""
        return self.num_virtual_tokens if self.method == "prompt_tuning" else 0

    @property
    def seed(self) -> int:
        return self.training.get("seed", 42)

    @property
    def base(self) -> str:
        """The base model: a folder as an absolute path, or a Hub id. bases/NAME is one that lies in CareLM's cache, or in the
        user's own, which all nodes of a cluster see."""
        return locate(self.model["model_name_or_path"], cache(), Path(os.path.expanduser(OWN_CACHE)))

    @property
    def revision(self) -> str:
        """The base's branch, tag or commit on the Hub."""
        return self.model.get("model_revision", "main")

    @property
    def bits(self) -> int | None:
        """4 or 8 for a quantised base, None for one in the run's precision."""
        return 4 if self.model.get("load_in_4bit") else 8 if self.model.get("load_in_8bit") else None

    def keys(self) -> dict[str, Any]:
        """Every key of the run with its value, flat, as `recipe.yaml` holds it; secrets are left out."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "help" in f.metadata}
        for once in ONCE:
            del own[once]
        return {**own, **self.model, **{k: v for k, v in self.training.items() if k != "hub_token"}}


def micro_batch_size(recipe: Recipe, ranks: int) -> int:
    """Examples that one rank takes in one forward: `per_device_train_batch_size`, or less where its share is less.

    Raises:
        UserError: where the global batch does not divide, with the nearest sizes that do.
    """
    total, asked = recipe.global_batch_size, recipe.training.get("per_device_train_batch_size", 8)
    if total % ranks:
        below, above = total // ranks * ranks, -(-total // ranks) * ranks
        sizes = f"{below} or {above}" if below else str(above)
        raise UserError(f"global_batch_size: {total} does not divide by {ranks} ranks; the nearest sizes are {sizes}")
    share = total // ranks
    if asked >= share:
        return share
    if share % asked:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        below, above = max(d for d in divisors if d < asked), min(d for d in divisors if d > asked)
        raise UserError(
            f"per_device_train_batch_size: {asked} does not divide each rank's share of {share} (global_batch_size {total} "
            f"over {ranks} ranks); the nearest sizes are {below} and {above}"
        )
    return asked
