"""What turns texts into vectors: a sentence-transformers model, by its folder or its name on the Hub."""

import hashlib
import importlib.util
import json
import math
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from carelm.data.sources import why_not_had
from carelm.errors import UserError, first_line
from carelm.files import OWN_CACHE, OWN_EMBEDDER, cache, fingerprint, locate
from carelm.ranks import say
from carelm.recipe import Recipe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DECIDING = (".safetensors", ".json", ".txt", ".model")  # files that decide what a text becomes
ABOUT = ("source.json", "data_config.json", "README.md")  # files that only tell about the model
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # nothing pickled
OTHER_FORMATS = ["onnx/*", "openvino/*"]
AT_A_TIME = 64  # texts, sorted by length
MANY = 500  # texts that are worth a progress bar


def check_installed(*packages: str) -> None:
    """Raises UserError where one of these is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} not installed: pip install -e '.[retrieval]'")


def find_embedder(recipe: Recipe) -> "Embedder | None":
    """The recipe's; None where passages are to be found by their words alone, which is said where it was not asked for.

    Raises:
        UserError: where the model is neither here nor on the Hub.
    """
    if recipe.retriever == "bm25":
        return None
    own = (cache(), Path(os.path.expanduser(OWN_CACHE)))
    if recipe.embedder != "auto":
        check_installed("sentence_transformers")
        return Embedder(_fetched(locate(recipe.embedder, *own)))
    folder = Path(locate(OWN_EMBEDDER, *own))
    if folder.is_dir():
        check_installed("sentence_transformers")
        return Embedder(folder)
    make = "python demo/embedder.py makes one"
    if recipe.retriever == "dense":
        raise UserError(f"embedder: {OWN_EMBEDDER} is not in CareLM's cache; {make}, or set retriever: bm25")
    say(f"embedder: there is none in CareLM's cache, passages are found by their words alone (BM25); {make}")
    return None


def _fetched(name: str) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~", "embedders/")) or name.count("/") > 1:  # no name of the Hub's
        raise UserError(
            f"embedder: there is no folder {name}; train/embedder.py tunes one, beginning with --embedder auto"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        raise why_not_had("embedder", name, error) from None


class Embedder:
    """A sentence-transformers model, loaded when the first text comes. Any thread may ask it.

    Attributes:
        folder: its files.
        precision: what it computes in: bf16 where the hardware has it. What is in an index says it for questions too.
        fingerprint: a hash of all that decides what a text becomes.
    """

    def __init__(self, folder: Path, precision: str | None = None):
        self.folder = folder
        self.precision = precision
        self._lock = threading.Lock()  # a tokenizer serves one thread at a time

    @cached_property
    def fingerprint(self) -> str:
        digests = {}
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if (
                file.suffix in DECIDING
                and name not in ABOUT
                and file.is_file()
                and not name.startswith(("onnx", "openvino"))
            ):
                with open(file, "rb") as opened:
                    digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        if not digests:
            raise UserError(f"embedder: {self.folder} holds no model of sentence-transformers")
        return fingerprint(json.dumps(digests))

    @cached_property
    def model(self) -> "SentenceTransformer":
        check_installed("sentence_transformers")
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        from carelm.models.precision import DTYPES, choose_precision

        disable_progress_bar()  # of its weights, which take a moment
        has_gpu = torch.cuda.is_available()
        if self.precision is None:
            self.precision = "bf16" if choose_precision("auto", training=False).name == "bf16" else "fp32"
        try:
            model = SentenceTransformer(
                str(self.folder),
                device="cuda" if has_gpu else "cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": DTYPES[self.precision], "use_safetensors": True},
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"embedder: {self.folder} cannot be loaded ({first_line(error)})") from None
        return model.eval()

    @property
    def dimension(self) -> int:
        return self.embed(["a"]).shape[1]

    @property
    def max_tokens(self) -> float:
        """Tokens of a text that are read, what follows them is not; infinite where all are."""
        return self.model.max_seq_length or math.inf

    def embed(self, texts: Sequence[str], questions: bool = False) -> np.ndarray:
        """Vectors of length 1, float32 [texts, dimension].

        Args:
            questions: whether they are asked of the others; some models put other words in front of these.
        """
        encode = self.model.encode_query if questions else self.model.encode_document
        with self._lock:
            vectors = encode([*texts], batch_size=AT_A_TIME, show_progress_bar=len(texts) >= MANY).astype(np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def count_too_long(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than it reads."""
        if math.isinf(self.max_tokens):
            return 0
        tokenizer = self.model.tokenizer
        with self._lock:
            lengths = [len(ids) for ids in tokenizer([*texts], truncation=False, verbose=False)["input_ids"]]
        return sum(length > self.max_tokens for length in lengths)
