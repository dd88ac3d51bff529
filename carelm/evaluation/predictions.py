"""The file of one model's predictions, to which every rank appends as it goes and from which a killed run goes on.

A line is {"id", "conversation", "category", "prediction", "references", "new_tokens", "prompt_tokens", "finish_reason",
"made_by"}. `made_by` is a hash of the weights, how they are held, the decoding and the prompt: a line counts only where it is
still the one that would be made today.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from carelm.files import write_rows
from carelm.ranks import say
from carelm.training.runs import free_name


class PredictionFile:
    """Args: the file; `made_by` gives for the id of each question the hash that its line must have."""

    def __init__(self, path: Path, made_by: dict[str, str]):
        self.path, self.made_by = path, made_by

    def read(self) -> dict[str, dict[str, Any]]:
        """The lines that count, by id; the line that a killed run left half written does not."""
        return {line["id"]: line for line in self._lines() if self.made_by.get(line["id"]) == line["made_by"]}

    def open(self) -> set[str]:
        """The ids that are done. Where the file answers these questions otherwise, it is kept aside first (rank 0 only)."""
        done = self.read()
        if any(self.made_by.get(line["id"], line["made_by"]) != line["made_by"] for line in self._lines()):
            aside = free_name(self.path)
            shutil.copy2(self.path, aside)
            say(f"{self.path} holds predictions of another model, prompt or decoding; they are kept as {aside.name}")
        if self.path.exists():
            self._write(done)
        if done and len(done) < len(self.made_by):
            say(f"{self.path.name}: {len(done)} of {len(self.made_by)} are there; goes on with the others")
        return set(done)

    def append(self, line: dict[str, Any]) -> None:
        """Adds one whole line; several ranks may do so at a time."""
        import fcntl

        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)

    def close(self) -> list[dict[str, Any]]:
        """All predictions in the order of the questions; the file is left in that order (rank 0 only)."""
        done = self.read()
        self._write(done)
        return [done[question] for question in self.made_by]

    def _lines(self) -> Iterable[dict[str, Any]]:
        for line in self._pieces():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                pass

    def _pieces(self) -> list[bytes]:
        try:
            return [piece for piece in self.path.read_bytes().split(b"\n") if piece]
        except FileNotFoundError:
            return []

    def _write(self, done: dict[str, dict[str, Any]]) -> None:
        """Those of the questions first and in their order, then those of questions that are not asked this time."""
        lines = [done[question] for question in self.made_by if question in done]
        lines += {line["id"]: line for line in self._lines() if line["id"] not in self.made_by}.values()
        write_rows(self.path, lines)
