"""Makes a base model of a given shape with random weights, for timing: it costs what a real one costs.

    python benchmarks/random_base.py --shape llama3_8b --folder FOLDER

The weights are written shard by shard, one per decoder layer, so that 8 B parameters (16 GB of disk) need no more
memory than one layer. The tokenizer, with its chat template, is demo/base's; only the vocabulary's size is the shape's.
"""

import argparse
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

DEMO_BASE = Path(__file__).resolve().parent.parent / "demo/base"
SHAPES = {
    "tiny": dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        vocab_size=2048,
    ),
    "llama_27m": dict(
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=1024,
        vocab_size=16_384,
    ),
    "tinyllama_1b": dict(
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
        vocab_size=32_000,
    ),
    "llama3_8b": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14_336,
        vocab_size=128_256,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
}


def write_random_base(shape: str, folder: Path, tokenizer_folder: Path = DEMO_BASE) -> int:
    """Writes config, tokenizer and float16 safetensors shards; returns the number of parameters.

    Args:
        shape: a key of SHAPES.
        folder: made where it is not there.
        tokenizer_folder: whose tokenizer files, chat template and special tokens the base gets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_folder / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        **{key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards = defaultdict(list)
    for name in shapes:
        parts = name.split(".")
        shards[f"layer-{int(parts[2]):03d}" if parts[1] == "layers" else parts[-2]].append(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {name: _random(name, shapes[name], generator, device).cpu() for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _random(name: str, shape: torch.Size, generator: torch.Generator, device: str) -> torch.Tensor:
    """Norms are 1, everything else is drawn from N(0, 0.02) as transformers would."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16, device=device)
    dtype = torch.float16 if device == "cuda" else torch.float32
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(0.02).half()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    print(f"{options.folder}: {write_random_base(options.shape, options.folder):,} parameters")


if __name__ == "__main__":
    main()
