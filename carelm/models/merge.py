"""An adapter and its base -> one plain checkpoint, one file of the base at a time, and how far it is from what it was made of.

A quantised base has two merges, which are two functions: onto the whole weights of the base, whose rounding the adapter has
never seen, and onto the dequantised weights that it was trained on.

The names in a base's files are not always those in the model (GPT-2 and BLOOM on the Hub, Gemma 3): they are mapped as
`from_pretrained` maps them, and the merge has the files and names that the base has. Experts that the model holds as one tensor
and the files one by one (Mixtral, Qwen3-MoE) are merged in the whole model instead, in fp32 in memory.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from carelm.chat.chat import Chat
from carelm.errors import UserError, first_line
from carelm.files import read_json, write_whole
from carelm.models.base import align_generation, auto_class, load_config, load_generation_config, quantization_config
from carelm.models.finite import not_finite
from carelm.models.precision import DTYPES
from carelm.ranks import say
from carelm.recipe import Recipe


def merge_weights(recipe: Recipe, adapter: Path, target: Path, onto: str, dtype: str) -> None:
    """Writes the merged weights and config into `target`.

    Args:
        recipe: names the base and how it was held.
        adapter: the adapter's folder.
        onto: "base" for the whole weights, "quantized" for the dequantised ones.
        dtype: fp32, bf16 or fp16; the sums are made in fp32.

    Raises:
        UserError: where the adapter is of a kind that cannot be merged, or does not fit the base, or a file is damaged; before
            any weights are loaded.
    """
    config = load_config(recipe)
    peft_config = PeftConfig.from_pretrained(adapter)
    if peft_config.is_prompt_learning:
        raise UserError(f"--adapter: {adapter} is a trained prompt, which has no weights to merge; serve it with PEFT")
    if getattr(peft_config, "bias", "none") != "none":
        raise UserError(f"--adapter: {adapter} trains biases (bias: {peft_config.bias}), which cannot be merged here")
    shards = _shards(recipe)
    with torch.device("meta"):
        plain, to_quantize = (auto_class(config).from_config(copy.deepcopy(config)) for _ in range(2))
    names = _names_in_model(plain, shards)
    tied = _tied(plain)
    if tied and config.is_encoder_decoder and _differ_in_files(tied, names, shards):
        tied, config.tie_word_embeddings = set(), False  # transformers calls every T5 tied, FLAN-T5 is not
    quantized = _quantized_modules(recipe, to_quantize) if onto == "quantized" else {}
    layers, trained = _trained(recipe, adapter, plain, peft_config)
    if both := sorted(tied & trained.keys()):
        raise UserError(
            f"--adapter: {adapter} holds its own {', '.join(both)}, and the base ties its word embeddings; such an adapter "
            "cannot be merged here"
        )
    target.mkdir(parents=True)
    by_file = all(f"{name}.weight" in names.values() for name in trained)
    if by_file and not any(isinstance(layers[name], ParamWrapper) for name in trained):
        _merge_files(recipe, shards, names, layers, trained, quantized, target, dtype)
        config.dtype = DTYPES[dtype]
        config.save_pretrained(target)
    else:
        _merge_whole(recipe, config, adapter, quantized, target, dtype)


def _merge_files(
    recipe: Recipe,
    shards: list[Path],
    names: dict[str, str],
    layers: dict[str, torch.nn.Module],
    trained: dict[str, dict[str, torch.Tensor]],
    quantized: dict[str, torch.nn.Module],
    target: Path,
    dtype: str,
) -> None:
    """Each of the base's files with its merged weights, under the names that they have there."""
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for file in tqdm(shards, desc="merge", unit="shard", dynamic_ncols=True):
        merged = {}
        for name, weight in _tensors(file):
            if name in names:
                _check_base(recipe, [(name, weight)])
            module, _, kind = names.get(name, "").rpartition(".")
            if kind == "weight" and module in quantized:
                weight = _dequantized(weight, quantized[module], DTYPES[recipe.precision])
            if kind == "weight" and module in trained:
                weight = _merged(layers[module], weight, trained[module])
            merged[name] = weight.to(DTYPES[dtype]).contiguous() if weight.is_floating_point() else weight
            index["weight_map"][name] = file.name
            index["metadata"]["total_size"] += merged[name].numel() * merged[name].element_size()
        _check_result(((name, merged[name]) for name in merged if name in names), dtype)
        save_file(merged, target / file.name, metadata={"format": "pt"})
    if len(shards) > 1:
        write_whole(target / "model.safetensors.index.json", json.dumps(index, indent=1))


def _merge_whole(
    recipe: Recipe,
    config: PreTrainedConfig,
    adapter: Path,
    quantized: dict[str, torch.nn.Module],
    target: Path,
    dtype: str,
) -> None:
    """Merges in memory, and leaves to `save_pretrained` what the tensors are called in files."""
    say("the files hold some of the trained weights in parts: the whole model is merged in memory, in fp32")
    model = auto_class(config).from_pretrained(
        recipe.base, revision=recipe.revision, config=config, dtype=torch.float32,
        use_safetensors=True,
    )  # fmt: skip
    _check_base(recipe, model.named_parameters())
    for name, module in quantized.items():
        held = model.get_submodule(name)
        held.weight.data = _dequantized(held.weight.data, module, DTYPES[recipe.precision])
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(progressbar=True, safe_merge=True)
    merged.generation_config = GenerationConfig()  # the run's own is written beside
    merged.to(DTYPES[dtype])
    _check_result(merged.named_parameters(), dtype)
    merged.save_pretrained(target)


def _check_base(recipe: Recipe, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    if bad := not_finite(tensors):
        raise UserError(f"model_name_or_path: {recipe.base} holds NaN or infinity in {bad[0]}; take another copy of it")


def _check_result(tensors: Iterable[tuple[str, torch.Tensor]], dtype: str) -> None:
    if bad := not_finite(tensors):
        raise UserError(f"--dtype: {bad[0]} of the merge is too large for {dtype}; take bf16 or fp32")


def _tied(model: PreTrainedModel) -> set[str]:
    """The modules that share their weight, as far as they are word embeddings and output layer."""
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in pair or pair[0].weight is not pair[1].weight:
        return set()
    return {name for name, module in model.named_modules() if any(module is one for one in pair)}


def _differ_in_files(modules: set[str], names: dict[str, str], shards: list[Path]) -> bool:
    """Whether the files hold weights of these modules that are not all the same."""
    wanted = {name for name, known in names.items() if known.removesuffix(".weight") in modules}
    held = [weight for file in shards for name, weight in _tensors(file) if name in wanted]
    return any(not torch.equal(weight, held[0]) for weight in held)


def _trained(
    recipe: Recipe, adapter: Path, plain: PreTrainedModel, peft_config: PeftConfig
) -> tuple[dict[str, torch.nn.Module], dict[str, dict[str, torch.Tensor]]]:
    """The model's modules by name, with the adapter's layers on the meta device; and what was trained, by module and name.

    Raises:
        UserError: where the adapter's file does not hold what its configuration makes of this base.
    """
    try:
        model = get_peft_model(plain, peft_config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise _other_base(adapter, recipe, first_line(error)) from None
    fitting = get_peft_model_state_dict(model, state_dict=model.state_dict(), save_embedding_layers=False)
    wanted = {name: list(tensor.shape) for name, tensor in fitting.items()}
    tensors = {
        name: tensor
        for name, tensor in load_peft_weights(adapter, device="cpu").items()
        if not name.endswith(".base_layer.weight")  # PEFT keeps a copy of embeddings beside their adapter
    }
    held = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            what = f"{name} is {held.get(name) or 'missing'} there and {wanted.get(name) or 'nothing'} on this base"
            raise _other_base(adapter, recipe, what)
    trained: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, kind = _split_name(name.removeprefix("base_model.model."))
        trained.setdefault(module, {})[kind] = tensor
    return dict(model.base_model.model.named_modules()), trained


def _other_base(adapter: Path, recipe: Recipe, why: str) -> UserError:
    return UserError(
        f"--adapter: {adapter} belongs to another base than {recipe.base}, or its files to two adapters ({why})"
    )


def _names_in_model(model: PreTrainedModel, shards: list[Path]) -> dict[str, str]:
    """The name in the model of each tensor of the files, as `from_pretrained` maps it (convert_and_load_state_dict_in_model of
    transformers.core_model_loading); those that are joined or split on the way are left out."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    known = model.state_dict()
    found = {}
    for file in shards:
        for name in _names(file):
            renamed, joined = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if renamed not in known and name in known:
                renamed, joined = name, None
            if renamed in known and joined is None:
                found[name] = renamed
    return found


def save_beside(recipe: Recipe, adapter: Path, chat: Chat, target: Path) -> None:
    """Tokenizer, chat template and generation config, as the adapter was trained with.

    A checkpoint has no generation config of its own: it is made of the base's, as at the start of a training.
    """
    chat.tokenizer.save_pretrained(target)
    generation = load_generation_config(str(adapter))
    generation = generation or load_generation_config(recipe.base, recipe.revision)
    generation = generation or GenerationConfig.from_model_config(load_config(recipe))
    align_generation(generation, chat)
    generation.save_pretrained(target)


def _quantized_modules(recipe: Recipe, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that bitsandbytes holds in 4 or 8 bits when the base is loaded as for training; all on the meta device."""
    settings = quantization_config(recipe, DTYPES[recipe.precision])
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map=None)
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


def _dequantized(weight: torch.Tensor, module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight as the quantised layer computes with it, in fp32."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params, Params4bit

    held = {k: v for k, v in module.weight.__dict__.items() if not k.startswith("_")}
    turned = issubclass(module.source_cls, Conv1D)  # GPT-2's layers are held the other way round
    weight = weight.T if turned else weight
    if type(module).__name__ == "Linear4bit":
        packed = Params4bit(weight.to(dtype), requires_grad=False, **held).to("cpu")
        weight = dequantize_4bit(packed.data, packed.quant_state).float()
    else:
        packed = Int8Params(weight.to(dtype), requires_grad=False).to("cpu")
        weight = int8_vectorwise_dequant(packed.data, packed.SCB).float()
    return weight.T.contiguous() if turned else weight


def _split_name(name: str) -> tuple[str, str]:
    """ "layers.0.q_proj.lora_A.weight" -> ("layers.0.q_proj", "lora_A.default.weight"), the name in a PEFT layer."""
    module, found, kind = name.partition(".lora_")
    if not found:  # a weight of lora_modules_to_save
        return tuple(name.rsplit(".", 1))
    kind, _, rest = f"lora_{kind}".partition(".")
    rest = rest or ("weight" if kind == "lora_magnitude_vector" else "")
    return module, ".".join(part for part in (kind, "default", rest) if part)


def _merged(layer: torch.nn.Module, weight: torch.Tensor, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """PEFT's own merge of one layer in fp32; the other layers stay on the meta device."""
    if "weight" in trained:
        return trained["weight"]
    base = layer.get_base_layer()
    base.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    layer.load_state_dict({name: tensor.float() for name, tensor in trained.items()}, strict=False, assign=True)
    layer.merge(safe_merge=True)
    result = base.weight.data
    layer.to_empty(device="meta")
    return result


def _shards(recipe: Recipe) -> list[Path]:
    folder = Path(recipe.base)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.json"]
        folder = Path(
            snapshot_download(recipe.base, revision=recipe.model.get("model_revision"), allow_patterns=patterns)
        )
    index = read_json(folder / "model.safetensors.index.json")
    shards = [folder / name for name in sorted(set(index["weight_map"].values()) if index else {"model.safetensors"})]
    for file in shards:
        _names(file)
    return shards


def _names(file: Path) -> list[str]:
    """The tensors of a file; its length is checked on the way.

    Raises:
        UserError: where it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"model_name_or_path: {file} is missing or damaged ({error}); get the base again") from None


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no dictionary
            yield name, tensors.get_tensor(name)
