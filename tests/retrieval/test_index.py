"""An index is whole or not there: readers keep what they opened, and a build that fails or is killed leaves the one before."""

import json
import multiprocessing
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
from launching import copies, script
from small_index import SENTENCES, build_small, make_embedder

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval.index import Index
from carelm.retrieval.update import update
from carelm.retrieval.versions import building


@pytest.fixture
def documents(tmp_path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(SENTENCES[:3]))
    (folder / "b.txt").write_text("\n".join(SENTENCES[3:]))
    return folder


def texts(folder: Path) -> list[str]:
    index = Index(folder)
    found = sorted(passage.text for passage in index.passages())
    index.close()
    return found


def age(documents: Path) -> None:
    """As if the files had been written a while ago: the time of a fresh one says nothing yet."""
    for file in documents.iterdir():
        os.utime(file, ns=(10**18, 10**18 + file.stat().st_size))


def test_only_what_changed_is_read_again_and_what_is_gone_leaves(documents, tmp_path):
    age(documents)
    first = build_small(tmp_path / "index", documents)
    assert (first.changed, first.version, first.read, first.passages) == (True, 1, ["a.txt", "b.txt"], 5)
    again = build_small(tmp_path / "index", documents)
    assert (again.changed, again.version, again.read, again.files) == (False, 1, [], first.files)
    (documents / "a.txt").write_text("A lamp needs a bulb.")
    changed = build_small(tmp_path / "index", documents)
    assert (changed.version, changed.read) == (2, ["a.txt"])
    assert texts(tmp_path / "index") == sorted(["A lamp needs a bulb.", *SENTENCES[3:]])
    (documents / "b.txt").unlink()
    assert build_small(tmp_path / "index", documents).removed == ["b.txt"]
    assert texts(tmp_path / "index") == ["A lamp needs a bulb."]


def test_a_file_that_was_only_touched_is_not_read_again_and_one_changed_at_the_same_moment_is(documents, tmp_path):
    age(documents)
    build_small(tmp_path / "index", documents)
    os.utime(documents / "a.txt", ns=(10**18 + 9, 10**18 + 9))
    assert build_small(tmp_path / "index", documents).read == []
    manifest = json.loads((tmp_path / "index/1/manifest.json").read_text())
    assert manifest["files"]["a.txt"]["seen"] == [[(documents / "a.txt").stat().st_size, 10**18 + 9]]
    (documents / "a.txt").write_text("A")
    build_small(tmp_path / "index", documents)
    about = (documents / "a.txt").stat()
    (documents / "a.txt").write_text("B")  # of the same size, and a clock that has not moved
    os.utime(documents / "a.txt", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert build_small(tmp_path / "index", documents).read == ["a.txt"]


def test_other_settings_read_all_again_and_another_embedder_takes_over_what_was_read(documents, tmp_path, capsys):
    one, other = make_embedder(tmp_path / "one"), make_embedder(tmp_path / "other", seed=1)
    assert build_small(tmp_path / "index", documents, one, chunk_tokens=9).embedded == 5
    report = build_small(tmp_path / "index", documents, one, chunk_tokens=8)
    assert (report.read, report.embedded, report.version) == (["a.txt", "b.txt"], 0, 2)  # the same texts
    (documents / "b.txt").write_text(f"{SENTENCES[3]}\nParcels arrive by ship.")
    assert build_small(tmp_path / "index", documents, one, chunk_tokens=8).embedded == 1
    report = build_small(tmp_path / "index", documents, other, chunk_tokens=8)
    assert (report.read, report.embedded, report.version) == ([], 5, 4)
    index = Index(tmp_path / "index")
    index.check_embedder(other)
    with pytest.raises(UserError, match="was made with another embedder .*other.*; make it: python serve/index.py"):
        index.check_embedder(one)


def test_a_reader_keeps_what_it_opened_and_a_version_that_nobody_reads_is_taken_away(documents, tmp_path):
    build_small(tmp_path / "index", documents)
    reader = Index(tmp_path / "index")
    (documents / "a.txt").write_text("A lamp needs a bulb.")
    build_small(tmp_path / "index", documents)
    assert not reader.is_current() and reader.by_words("battery", 3).num_rows == 1
    assert (tmp_path / "index/1").is_dir()
    reader.close()
    build_small(tmp_path / "index", documents)
    assert not (tmp_path / "index/1").exists() and (tmp_path / "index/2").is_dir()


def test_two_builds_at_once_come_one_after_the_other(documents, tmp_path, capsys):
    reports = []
    with building(tmp_path / "index"):
        second = threading.Thread(target=lambda: reports.append(build_small(tmp_path / "index", documents)))
        second.start()
        time.sleep(0.2)
        assert not reports and "another build" in capsys.readouterr().err
    second.join(60)
    assert reports[0].version == 1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda folder: None, "is not there yet; make it: python serve/index.py"),
        (lambda folder: (folder / "1.partial").mkdir(parents=True), "is half built; make it: python serve/index.py"),
    ],
)
def test_an_index_that_cannot_be_searched_is_one_line_with_the_command(tmp_path, state, said):
    state(tmp_path / "index")
    with pytest.raises(UserError, match=said):
        Index(tmp_path / "index")


@pytest.mark.parametrize("lost", ["lock", "manifest.json", "passages.lance/data"])
def test_a_damaged_index_is_said_to_be_and_the_next_build_makes_it_anew(documents, tmp_path, capsys, lost):
    build_small(tmp_path / "index", documents)
    place = tmp_path / "index/1" / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UserError, match="index: .*1 is damaged .*; make it: python serve/index.py"):
        Index(tmp_path / "index")
    again = build_small(tmp_path / "index", documents, chunk_tokens=1)
    assert (again.read, again.passages) == (["a.txt", "b.txt"], 5) and texts(tmp_path / "index") == sorted(SENTENCES)
    assert "is damaged" in capsys.readouterr().err


def test_one_of_a_newer_format_is_neither_read_nor_replaced(documents, tmp_path):
    build_small(tmp_path / "index", documents)
    (tmp_path / "index/current.json").write_text('{"version": 1, "format": 2}')
    for use in (lambda: Index(tmp_path / "index"), lambda: build_small(tmp_path / "index", documents)):
        with pytest.raises(UserError, match="is of format 2, which a newer CareLM has written"):
            use()
    assert (tmp_path / "index/1").is_dir()


def test_documents_without_a_passage_leave_the_index_before(documents, tmp_path):
    build_small(tmp_path / "index", documents)
    for file in documents.iterdir():
        file.write_text("")
    with pytest.raises(UserError, match="documents: none of 2 files has a passage"):
        build_small(tmp_path / "index", documents)
    assert texts(tmp_path / "index") == sorted(SENTENCES)


def _build_in_process(folder: Path, documents: Path, largest_file: int, sign: Path) -> None:
    os.dup2(os.open(sign.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sign.touch()
    try:
        build_small(folder, documents)
    except UserError as error:
        sign.with_suffix(".err").write_text(str(error))


def _start(folder: Path, documents: Path, sign: Path, largest_file: int = 2**40) -> multiprocessing.Process:
    process = copies.Process(target=_build_in_process, args=(folder, documents, largest_file, sign))
    process.start()
    while not sign.exists():
        time.sleep(0.001)
    return process


def test_a_build_killed_at_any_moment_leaves_the_one_before_whole(documents, tmp_path):
    lines = [f"{SENTENCES[number % 5]} {number}" for number in range(300)]
    (documents / "b.txt").write_text("\n".join(lines))
    whole = _start(tmp_path / "index", documents, tmp_path / "whole")
    began = time.monotonic()
    whole.join()
    seconds = time.monotonic() - began
    before, left_before = texts(tmp_path / "index"), 0
    assert len(before) == 303
    for moment in range(5):
        (documents / "a.txt").write_text(f"A lamp needs bulb {moment}.")
        process = _start(tmp_path / "index", documents, tmp_path / f"began{moment}")
        time.sleep(seconds * (moment + 0.5) / 5)
        process.kill()
        process.join()
        now = texts(tmp_path / "index")
        assert now in (before, sorted([*lines, f"A lamp needs bulb {moment}."]))
        left_before += now == before
        before = now
    assert left_before >= 2
    assert build_small(tmp_path / "index", documents).passages == 301
    assert not [*(tmp_path / "index").glob("*.partial")] and len([*(tmp_path / "index").glob("*/manifest.json")]) == 1


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_the_one_before(documents, tmp_path):
    build_small(tmp_path / "index", documents)
    (documents / "b.txt").write_text("\n".join(f"{SENTENCES[number % 5]} {number}" for number in range(3000)))
    _start(tmp_path / "index", documents, tmp_path / "began", largest_file=20_000).join()
    said = (tmp_path / "began.err").read_text()
    assert said.startswith("index: ") and "nothing of it is left (" in said and "\n" not in said
    assert ".rs:" not in said  # where LanceDB was compiled
    assert texts(tmp_path / "index") == sorted(SENTENCES) and not [*(tmp_path / "index").glob("*.partial/")]


# The launched file


def test_a_recipes_documents_become_an_index_and_what_is_twice_there_is_read_once(documents, tmp_path):
    (documents / "c.txt").write_text((documents / "a.txt").read_text())
    (documents / "picture.png").write_bytes(b"\x89PNG")
    for name in ("d.txt", "e.txt"):
        (documents / name).touch()
    keys = ["--documents", documents, "--index", tmp_path / "index", "--retriever", "bm25"]
    done = script(*keys, file="serve/index.py", check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["changed"], report["files"], report["passages"], report["unused"]) == (True, 5, 2, 1)
    assert report["not_read"].keys() == {"c.txt", "d.txt", "e.txt"} and "2 of 5 files read" in done.stderr
    assert "not read: c.txt has the same content as a.txt" in done.stderr and "not used: picture.png" in done.stderr
    assert all(f"not read: {name} is empty (0 bytes)" in done.stderr for name in ("d.txt", "e.txt"))
    assert "gemm_4bit" not in done.stderr  # a library's warning that nobody can do anything about
    (documents / "a.txt").unlink()
    again = update(load_recipe([*map(str, keys)], usage=""))
    assert (again.read, again.removed, again.passages) == (["c.txt"], ["a.txt"], 2) and "gone: a.txt" in again.lines()
