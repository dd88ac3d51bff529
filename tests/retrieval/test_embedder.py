"""An embedder is a folder of sentence-transformers or a name on the Hub, and any thread may ask it."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from hub_server import serve
from small_index import SENTENCES, make_embedder

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval.embedder import Embedder, find_embedder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny one of all-MiniLM-L6-v2's kind."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word.strip(".").lower() for text in SENTENCES for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=6 + len(words), **size)).save_pretrained(folder / "model")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    module = Transformer(str(folder / "model"), max_seq_length=8)
    pooling = Pooling(module.get_embedding_dimension())
    SentenceTransformer(modules=[module, pooling], device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def test_vectors_have_length_1_and_threads_get_those_that_one_alone_gets(bert):
    embedder = Embedder(bert, "fp32")
    alone = [embedder.embed([text])[0] for text in SENTENCES]
    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(lambda text: embedder.embed([text])[0], SENTENCES * 8)]
    assert np.allclose(found, alone * 8, atol=1e-6) and found[0].dtype == np.float32
    assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5) and embedder.dimension == 32
    in_bf16 = Embedder(bert, "bf16").embed(SENTENCES)
    assert np.allclose(np.linalg.norm(in_bf16, axis=1), 1, atol=1e-5) and (in_bf16 * alone).sum(1).min() > 0.99


def test_texts_that_it_does_not_read_to_their_end_are_counted(bert):
    embedder = Embedder(bert, "fp32")
    assert embedder.max_tokens == 8 and embedder.count_too_long(["the lamp .", *SENTENCES[:1]]) == 1


def test_its_fingerprint_is_that_of_what_decides_its_vectors(tmp_path):
    first = make_embedder(tmp_path / "first").fingerprint
    again, other = make_embedder(tmp_path / "again"), make_embedder(tmp_path / "other", seed=1)
    (tmp_path / "again/README.md").write_text("# Another text")
    assert again.fingerprint == first != other.fingerprint


def test_one_of_the_hub_is_fetched_without_pickles_and_other_formats(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "hub")
    (tmp_path / "hub/pickled.bin").touch()
    (tmp_path / "hub/onnx").mkdir()
    (tmp_path / "hub/onnx/config.json").touch()
    code = (
        "from carelm.recipe_file import load_recipe; from carelm.retrieval.embedder import find_embedder; "
        "print(find_embedder(load_recipe(['--embedder', 'nobody/tiny'], usage='')).folder)"
    )
    with serve({"models/nobody/tiny": tmp_path / "hub"}) as address:
        variables = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    fetched = Path(done.stdout.strip())
    kept = [file for file in bert.rglob("*") if file.suffix in (".json", ".txt", ".safetensors")]
    names = {str(file.relative_to(bert)) for file in kept}
    assert {str(file.relative_to(fetched)) for file in fetched.rglob("*") if file.is_file()} == names
    assert np.allclose(Embedder(fetched, "fp32").embed(SENTENCES), Embedder(bert, "fp32").embed(SENTENCES))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", "embedder: there is no folder ./none"),
        ("outputs/none/embedder", "embedder: there is no folder outputs/none/embedder; train/embedder.py tunes one"),
        ("{}", "embedder: .* holds no model of sentence-transformers"),
        ("nobody/nothing", "embedder: nobody/nothing is no file or folder here"),
    ],
)
def test_what_is_no_embedder_is_one_line(tmp_path, name, said, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=said) as caught:
        find_embedder(load_recipe(["--embedder", name.format(tmp_path)], usage="")).fingerprint  # noqa: B018
    assert "\n" not in str(caught.value)
