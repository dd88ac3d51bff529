"""The models that are compared: what `base`, `adapter`, `merged` and a folder stand for, and how each is loaded."""

import dataclasses
import difflib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from carelm.adapter_folder import adapter_fingerprint, decided_keys
from carelm.chat.chat import Chat
from carelm.chat.encoder_decoder import is_encoder_decoder, overflows_in_fp16
from carelm.chat.tokenizer import load_tokenizer
from carelm.data.sources import changed_files, hash_files
from carelm.errors import UserError
from carelm.evaluation.api import ApiModel, find_api
from carelm.files import fingerprint, locate, near, read_json
from carelm.keys import DEFAULTS, FREE_KEYS, NOT_ABOUT_DATA, identity_of
from carelm.recipe import CERTIFIED, Recipe
from carelm.training.checkpoint_folders import find_recipe
from carelm.training.runs import untrained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from carelm.models.precision import Precision

HELD = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}, "bf16": {}, "fp16": {}, "fp32": {}}
QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


@dataclass(frozen=True)
class Candidate:
    """One model of a comparison.

    Attributes:
        name: as in the results and in the names of files.
        kind: base, adapter or checkpoint (a merged model or a full fine-tune).
        recipe: the recipe with this model's base, bits and precision in place of the run's.
        adapter: the adapter's folder, or None.
        home: the folder whose tokenizer is used.
    """

    name: str
    kind: str
    recipe: Recipe
    adapter: Path | None
    home: str

    @property
    def bits(self) -> int | None:
        return self.recipe.bits

    @property
    def is_encoder_decoder(self) -> bool:
        return is_encoder_decoder(self.recipe.base, self.recipe.revision)

    @property
    def adapter_name(self) -> str:
        """What PEFT calls its adapter: no dot may be in the name of a part of a model, nor may it be that of a method."""
        return f"of_{self.name.replace('.', '_')}"

    def make_chat(self) -> Chat:
        """Renders prompts with this model's own tokenizer and template."""
        recipe = self.recipe
        of_base = self.kind != "checkpoint" and self.home == recipe.base
        template = recipe.training.get("chat_template_path") if of_base else None
        tokenizer = load_tokenizer(
            self.home,
            revision=recipe.revision if of_base else "main",
            trust_remote_code=recipe.training.get("trust_remote_code", False),
            template_file=locate(template) if template else None,
        )
        return Chat(
            tokenizer, trained_turns=recipe.trained_turns, max_length=recipe.max_length,
            is_encoder_decoder=self.is_encoder_decoder,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Differs where the weights, how they are held, or the base's ids that end an answer do."""
        from carelm.models.base import base_fingerprint

        held = {key: self.recipe.model.get(key) for key in QUANTIZATION}
        base = base_fingerprint(self.recipe.base, self.recipe.revision)
        ends = read_json(Path(self.recipe.base) / "generation_config.json").get("eos_token_id")
        return fingerprint(base, self.adapter and adapter_fingerprint(self.adapter), held, self.precision().name, ends)

    def precision(self) -> "Precision":
        """What it computes in on this machine, the same at each call and each start: what `auto` has to measure is kept.

        Raises:
            UserError: where that is not possible.
        """
        from carelm.models.precision import choose_precision

        recipe = self.recipe
        overflows = overflows_in_fp16(recipe.base, recipe.revision)
        choice = choose_precision(recipe.precision, recipe.output_dir, training=False, overflows_in_fp16=overflows)
        choice.keep(self.recipe.output_dir)
        return choice

    def computing_in(self, name: str) -> "Candidate":
        """The same in this precision, where it is left open (`auto`)."""
        if self.recipe.precision != "auto":
            return self
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, precision=name))

    def asked_by(self, recipe: Recipe) -> "Candidate":
        """The same with the window and the trained turns of another test's recipe."""
        training = self.recipe.training | {"max_length": recipe.max_length}
        asked = dataclasses.replace(self.recipe, trained_turns=recipe.trained_turns, training=training)
        return dataclasses.replace(self, recipe=asked)

    def check_base(self) -> None:
        """Raises UserError where the base that an adapter was trained on has changed since."""
        from carelm.models.base import base_fingerprint

        if not self.adapter:
            return
        metrics = read_json(self.adapter / "train_metrics.json") or read_json(self.adapter / "complete.json")
        now = base_fingerprint(self.recipe.base, self.recipe.revision)
        if metrics.get("base_fingerprint", now) != now:
            raise UserError(
                f"models: {self.adapter} was trained on another base than {self.recipe.base} now holds (fingerprint "
                f"{metrics['base_fingerprint']}, now {now}); set model_name_or_path to the base it was trained on"
            )

    def check_finite(self) -> None:
        """Raises UserError where an adapter's weights are damaged, or NaN or infinity: it would answer all the same."""
        from carelm.models.finite import not_finite_in

        if not self.adapter:
            return
        file = self.adapter / "adapter_model.safetensors"
        try:
            bad, total = not_finite_in(file)
        except SafetensorError as error:
            raise UserError(f"models: {file} is damaged ({error}); train it again, or name another one") from None
        if bad:
            raise UserError(
                f"models: adapter {self.adapter} holds NaN in {len(bad)} of {total} tensors; train it again with a lower "
                "learning_rate, or name another one"
            )

    def prompt_limit(self, recipe: Recipe, chat: Chat) -> int:
        """The most tokens of a prompt: the training window, and what `max_new_tokens` leaves of the model's positions.

        Raises:
            UserError: where that is nothing, there is no such model, or its vocabulary is not the tokenizer's.
        """
        positions = self.positions(recipe, chat)
        limit = positions - recipe.max_new_tokens
        if chat.is_encoder_decoder and limit > 0:
            limit = positions  # the answer has its own
        if recipe.num_shots == 0:
            limit = min(limit, recipe.max_length)
        if limit < 1:
            raise UserError(
                f"max_new_tokens: {recipe.max_new_tokens} leaves no room for a prompt in the {positions} positions of "
                f"{self.name}; set it lower"
            )
        return limit

    def positions(self, recipe: Recipe, chat: Chat) -> int:
        """The tokens that the model has positions for, less those of a trained prompt.

        Raises:
            UserError: where there is no such model, or its vocabulary is not the tokenizer's.
        """
        from carelm.models.base import check_vocabulary, load_config

        config = load_config(self.recipe)
        check_vocabulary(chat, config)
        own = decided_keys(self.adapter).get("num_virtual_tokens", 0) if self.adapter else 0
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
        return positions - max(own, recipe.virtual_tokens)

    def stops(self, chat: Chat) -> set[int]:
        """The tokens that end an answer, known without its weights."""
        from carelm.models import base

        config = base.own_generation_config(self.recipe)
        base.align_generation(config, chat)
        return {*config.eos_token_id}

    def shares_base(self, other: "Candidate") -> bool:
        """Whether one base in memory does for both."""
        keys = ("model_revision", *QUANTIZATION)
        own, others = ([c.recipe.base, c.precision().name, *map(c.recipe.model.get, keys)] for c in (self, other))
        return own == others

    def load(
        self, chat: Chat, onto: "PreTrainedModel | PeftModel | None" = None
    ) -> tuple["PreTrainedModel | PeftModel", dict[str, Any]]:
        """The model, ready to generate on this rank's device, and what to know of it: precision, size, seconds to load.

        Args:
            onto: what another candidate that shares its base has loaded; an adapter is put there beside the others, under this
                candidate's name.
        """
        import torch

        from carelm.models import adapters, base
        from carelm.models.finite import not_finite
        from carelm.models.generation import unused_settings
        from carelm.models.key_values import causal_model

        started = time.perf_counter()
        if onto is None:
            model = base.load_base(self.recipe, self.precision())
        else:
            model = onto
            causal_model(model).generation_config = base.own_generation_config(self.recipe)
        if torch.cuda.is_available() and self.bits is None:  # a quantised base is where the current device is
            model = model.to(f"cuda:{torch.cuda.current_device()}")
        of_base = base.count_parameters(model)[1]
        trained = read_json(Path(self.recipe.base) / "train_metrics.json").get("trainable_parameters")
        if self.adapter:
            model = adapters.load_adapter(model, self.adapter, self.adapter_name)
            trained = base.count_parameters(model)[1] - of_base
        if bad := not_finite(model.named_parameters()):
            raise UserError(
                f"models: {self.name} in {self.precision().name} holds NaN or infinity in {len(bad)} tensors, such as "
                f"{bad[0]}; take another copy of {self.recipe.base}"
            )
        base.align_special_tokens(model, chat)
        about = {
            "kind": self.kind,
            "folder": str(self.adapter or self.recipe.base),
            "precision": self.precision().name,
            "bits": self.bits,
            "unused_generation_config": unused_settings(model),
            "total_parameters": base.count_parameters(model)[1],
            "trained_parameters": trained,
            "load_seconds": round(time.perf_counter() - started, 2),
        }
        return model.eval(), about

    def other_data_keys(self, recipe: Recipe) -> list[str]:
        """The recipe's keys about data that were others when this adapter was trained; empty where that is not known."""
        own = _keys_of(self.adapter) if self.adapter else {}
        about_data = [f.name for f in dataclasses.fields(recipe) if "help" in f.metadata and f.name in own]
        free = NOT_ABOUT_DATA | FREE_KEYS | {"max_eval_samples"}  # fewer questions are no other ones
        about_data = [key for key in about_data if key not in free]
        return [key for key in about_data if identity_of(key, vars(recipe)) != identity_of(key, own)]

    def changed_data(self, recipe: Recipe) -> list[str]:
        """The recipe's data files that are not what they were when this adapter was trained on them."""
        metrics = read_json(self.adapter / "train_metrics.json") if self.adapter else {}
        if not metrics.get("data_files"):
            return []
        own = _keys_of(self.adapter)
        was, now = (identity_of("dataset_name", keys) for keys in (own, recipe.keys()))
        if was != now:
            return []
        mixed = tuple(own.get("also_train") or ())  # no test question was among those rows, whatever they are now
        files = {f: digest for f, digest in metrics["data_files"].items() if not f.startswith(mixed)}
        return sorted(changed_files(files, hash_files(dataclasses.replace(recipe, mixed={})) or {}))


def find_candidates(recipe: Recipe) -> list[Candidate | ApiModel]:
    """The recipe's `models`, or base, the run's result and its merge where it is there; nothing is loaded.

    Raises:
        UserError: for a model that is not there, cannot be told apart or has only pickled weights.
    """
    names = list(recipe.models)
    if not names:
        names = ["base", "adapter" if recipe.method != "full" else str(recipe.output_dir)]
        names += ["merged"] if (recipe.output_dir / "merged" / "merge.json").exists() else []
    found = [find_api(recipe, name) if name.startswith("api:") else find(recipe, name) for name in names]
    for candidate in found:
        if [c.name for c in found].count(candidate.name) > 1:
            raise UserError(f"models: two are called '{candidate.name}'; rename one of the folders, or name it once")
    return found


def as_served(recipe: Recipe, candidates: list[Candidate | ApiModel]) -> dict[str, str]:
    """What the run's certificate says of these models, in short; of one with other weights than it was made with, nothing."""
    told = read_json(recipe.output_dir / CERTIFIED).get("models", {})
    return {
        c.name: told[c.name]["in_short"]
        for c in candidates
        if isinstance(c, Candidate) and c.name in told and told[c.name]["fingerprint"] == c.fingerprint()
    }


def find(recipe: Recipe, name: str, is_own: bool = False) -> Candidate:
    """The model of this name; `is_own` says that the recipe is the one that made it, so that the base is the recipe's."""
    word, at, held = name.rpartition("@")
    if not at or (held not in HELD and Path(locate(name)).is_dir()):
        word, held = name, ""
    if held and held not in HELD:
        raise UserError(f"models: '{name}': after @ stands none of {', '.join(HELD)}")
    if word == "base":
        return _candidate(name, "base", recipe, recipe.base, recipe.model, held, None)
    if word == "adapter":
        folder, hint, is_own = recipe.output_dir, untrained(recipe.output_dir), True
        if recipe.method == "full":
            raise UserError(
                f"models: method: full makes no adapter; name its folder: --models base {recipe.output_dir}"
            )
    elif word == "merged":
        folder = recipe.output_dir / "merged"
        hint = f"merge first: python train/merge.py --adapter {recipe.output_dir} --output_dir {folder}"
    else:
        folder, hint = Path(locate(word)), "name base, adapter, merged or a folder"
        hint = untrained(folder) if (folder / "recipe.yaml").exists() else hint
    if not folder.is_dir():
        if word not in (words := ("base", "adapter", "merged")):
            like = difflib.get_close_matches(word, words) or near(folder)
            hint = f"did you mean '{like[0]}'?" if like else hint
        raise UserError(f"models: '{name}': there is no folder {folder}; {hint}")
    if word == "merged" and (recipe.output_dir / "adapter_model.safetensors").exists():
        made_of = read_json(folder / "merge.json").get("adapter")
        if made_of != adapter_fingerprint(recipe.output_dir):
            raise UserError(f"models: {folder} was made of an earlier adapter of {recipe.output_dir}; {hint}")
    label = word if word in ("adapter", "merged") else folder.resolve().name
    label += f"@{held}" if held else ""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(file, "numpy")
        except SafetensorError as error:
            raise UserError(f"models: {file} is damaged ({error}); make it or copy it again") from None
    if (folder / "adapter_config.json").exists():
        if not (folder / "adapter_model.safetensors").exists():
            raise UserError(f"models: {folder} holds an adapter without adapter_model.safetensors; {hint}")
        own = _keys_of(folder) or recipe.model
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        base = recipe.base if is_own else locate(str(base))
        if base.startswith(("/", ".")) and not Path(base).is_dir():
            if not Path(recipe.base).is_dir():
                raise UserError(f"models: the base of {folder} is missing ({base}); set model_name_or_path to it")
            base = recipe.base
        return _candidate(label, "adapter", recipe, base, own, held, folder)
    if not (folder / "config.json").exists():
        raise UserError(f"models: {folder} holds no model and no adapter; {hint}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"models: {folder} holds no .safetensors weights; pickled ones are not loaded")
    if not (folder / "tokenizer.json").exists() and not any(folder.glob("*.model")):
        raise UserError(f"models: {folder} holds no tokenizer (no tokenizer.json, no *.model); {hint}")
    return _candidate(label, "checkpoint", recipe, str(folder), {}, held, None)


def _candidate(
    label: str, kind: str, recipe: Recipe, base: str, held_by: dict[str, Any], held: str, adapter: Path | None
) -> Candidate:
    model = {k: v for k, v in recipe.model.items() if k not in QUANTIZATION}
    model |= {"model_name_or_path": base, "use_bnb_nested_quant": DEFAULTS["use_bnb_nested_quant"]}
    if not held:
        model |= {k: held_by[k] for k in QUANTIZATION if k in held_by}
    elif held.endswith("bit"):
        model |= {k: held_by[k] for k in QUANTIZATION[2:] if k in held_by} | HELD[held]
    if kind == "checkpoint":
        model.pop("model_revision", None)
    precision = held if held and not held.endswith("bit") else recipe.precision
    # Only a full fine-tune is loaded in fp32 whatever the precision: here nothing is trained.
    changed = dataclasses.replace(recipe, model=model, precision=precision, method="lora")
    home = adapter if adapter is not None and (adapter / "tokenizer_config.json").exists() else base
    return Candidate(name=label, kind=kind, recipe=changed, adapter=adapter, home=str(home))


def _keys_of(folder: Path) -> dict[str, Any]:
    file = find_recipe(folder)
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}
