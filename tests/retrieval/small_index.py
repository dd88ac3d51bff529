"""Small indexes for tests: rows of their own, and a tiny embedder that is a real model of sentence-transformers."""

from pathlib import Path

from carelm.retrieval.embedder import Embedder
from carelm.retrieval.passages import Passage
from carelm.retrieval.update import Content, Report, build

SENTENCES = (
    "You can return a lamp within 30 days.", "Parcels arrive in three days.", "The battery lasts eight hours.",
    "Refunds are paid to the card that was used.", "The kettle switches itself off.",
)  # fmt: skip


def make_embedder(folder: Path, seed: int = 0) -> Embedder:
    """An embedder that adds up random vectors of words."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace

    words = sorted({word.strip(".").lower() for text in SENTENCES for word in text.split()})
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    torch.manual_seed(seed)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu").save(str(folder))
    return Embedder(folder, "fp32")


def content_of(folder: Path, columns: dict[str, dict[str, str]] | None = None, **settings) -> Content:
    """A passage for each line of each file in `folder`; `columns` are those of a file's passages, and color is a filter."""

    def read(name: str) -> tuple[list[Passage], dict]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        of_file = (columns or {}).get(name, {})
        passages = [
            Passage(f"{name}:{number}", name, None, number, None, of_file.get("product"), line, of_file)
            for number, line in enumerate(lines, 1)
        ]
        return passages, {"passages": len(passages)}

    files = {file.name: [file] for file in sorted(folder.glob("*.txt"))}
    return Content(files, read, settings, ["color"])


def build_small(folder: Path, documents: Path, embedder: Embedder | None = None, **settings) -> Report:
    return build(folder, content_of(documents, **settings), embedder)
