"""A run's output folder: which run it holds, whether that is finished, and what is written when it is. Imports no torch.

outputs/NAME/
    recipe.yaml           the recipe as resolved, from the start
    precision.json        what `precision: auto` has measured on a CPU at the first start, and chosen
    reference.npz         what a run of preferences compares with, see carelm.training.preferences
    data_report.json      what became of the rows
    answers/              what models have said for train/make_pairs.py and train/add_column.py
    checkpoint-N/         see carelm.training.checkpoints
    runs/                 TensorBoard, see carelm.training.tensorboard
    adapter_model.safetensors, adapter_config.json (or the model), tokenizer files, generation_config.json
    README.md             the model card
    train_metrics.json    written last: the run is finished
"""

import itertools
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from carelm.errors import UserError
from carelm.files import read_json, write_whole
from carelm.provenance import git_commit, versions
from carelm.ranks import Launch, rank, say, share
from carelm.recipe import ANSWERS, CERTIFIED, CHATS, ENGINE_LOG, FEEDBACK, PRECISION_NOTE, REFERENCE, Recipe
from carelm.recipe_file import check_identity, save_recipe
from carelm.training import finished, hub
from carelm.training.checkpoint_folders import find_checkpoints, step_of
from carelm.yaml_file import read_yaml

if TYPE_CHECKING:
    from trl import SFTConfig

LOCK = ".lock"  # held by the first rank of the run, or of the evaluation, that writes there
RESTARTED = ".restarted_by_job"
MADE_BESIDE = {
    "embedder",
    "eval",
    "index",
    "merged",
    ANSWERS,
    CERTIFIED,
    CHATS,
    ENGINE_LOG,
    FEEDBACK,
    PRECISION_NOTE,
    REFERENCE,
}  # by eval/run.py, serve/ and other files of train/, maybe before there is a run
LOCK_PATIENCE = 150  # seconds for a lost node's lock to run out; an NFS server gives it 90


def find_finished(recipe: Recipe) -> dict[str, Any] | None:
    """The metrics of this very run where it is finished; None where there is something to do.

    Raises:
        UserError: where the folder holds another run, or this one's data or result is not what it was.
    """
    saved = recipe.output_dir / "recipe.yaml"
    if not saved.exists():
        _check_unclaimed(recipe.output_dir)
    if not saved.exists() or restarts(recipe):
        return None
    if _has_saved_nothing(recipe.output_dir):
        return None
    check_identity(recipe, saved)
    file = recipe.output_dir / finished.METRICS
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(
            f"output_dir: {file} is damaged ({error}); remove it, and run again: what is saved is gone on from"
        ) from None
    answered = [a["question"] for a in metrics.get("card_answers", [])]
    if metrics.get("budget") != budget(recipe) or (recipe.card_questions and recipe.card_questions != answered):
        if not any(recipe.output_dir.glob("checkpoint-*")):
            what = "to go on from" if metrics.get("budget") != budget(recipe) else "to answer other card_questions from"
            raise UserError(
                f"output_dir: {recipe.output_dir} holds this run, finished at step {metrics['global_step']}, and no checkpoint "
                f"{what}; begin anew with --restart (it is kept aside), or set another output_dir"
            )
        return None
    finished.check(recipe, metrics)
    return metrics


def budget(recipe: Recipe) -> dict[str, Any]:
    """How long to train: with more of it, a finished run goes on."""
    return {key: recipe.training.get(key) for key in ("num_train_epochs", "max_steps")}


def restarts(recipe: Recipe) -> bool:
    """Whether to begin anew: a job that SLURM starts again goes on with what its first start began."""
    if not recipe.restart or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return recipe.restart
    try:
        return (recipe.output_dir / RESTARTED).read_text() != os.environ["SLURM_JOB_ID"]
    except OSError:
        return True


def goes_on(recipe: Recipe) -> bool:
    """Whether there are checkpoints, so that this run goes on from one (or is refused, where none is whole) and begins with
    nothing anew."""
    return not restarts(recipe) and bool(find_checkpoints(recipe.output_dir))


def untrained(folder: Path) -> str:
    """Why there is no result of a training in this folder, and what to do."""
    if is_running(folder / LOCK):
        return "a training is writing there now; wait for its end, or stop it with Ctrl-C, which saves"
    if saved := find_checkpoints(folder):
        return (
            f"its training is saved at step {step_of(saved[-1])} and not finished; the same training command goes on, or take "
            f"{saved[-1]} as it is"
        )
    return "train first, with train/sft.py and the same keys; the base alone is --models base"


def is_running(lock: Path) -> bool:
    """Whether the process that has written the lock's line is there still; of another machine's nothing is known."""
    try:
        words = lock.read_text(encoding="utf-8").split()
        process = psutil.Process(int(words[words.index("process") + 1]))
        return words[-1] == socket.gethostname() and process.create_time() < lock.stat().st_mtime
    except (OSError, ValueError, IndexError, psutil.Error):
        return False


def check_free(folder: Path) -> None:
    """Before the data is read, which may take long: nobody else writes there, and this run can.

    Raises:
        UserError: where that is not so.
    """
    is_job = "CARELM_STATUS_FILE" in os.environ  # the lock may be that of its earlier start: `lock` decides
    if not is_job and is_running(folder / LOCK):
        holder = (folder / LOCK).read_text(encoding="utf-8").strip()
        if f"process {os.getpid()} " not in holder:
            raise UserError(_in_use(folder, holder))
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"  # /proc says so of all that is new
        raise UserError(f"output_dir: {there} cannot be written{why}; set another output_dir") from None


def _in_use(folder: Path, holder: str) -> str:
    return (
        f"output_dir: {folder} is in use by {holder}; wait for it, or set another output_dir (if that machine is gone, remove "
        f"{folder / LOCK})"
    )


def _names(folder: Path) -> set[str]:
    """What lies there, without requests, locks and marks."""
    return {p.name for p in folder.iterdir() if not p.name.startswith((".", "stop_request"))}


def _has_saved_nothing(folder: Path) -> bool:
    """Whether what lies there is of a run that ended, or is still, before its first checkpoint."""
    return _names(folder) <= {"recipe.yaml", "runs", *MADE_BESIDE}


def _check_unclaimed(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"output_dir: {folder} is a file; set another output_dir")
    others = sorted(_names(folder) - MADE_BESIDE) if folder.is_dir() else []
    if others:
        there = ", ".join(others[:3])
        raise UserError(f"output_dir: {folder} holds no run of CareLM, but files ({there}); set another output_dir")


def free_name(path: Path) -> Path:
    """`path` with .old-1, .old-2 ... in its name: the first that is not taken, for what is to be kept aside."""
    path = path.resolve()
    stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    names = (path.with_name(f"{stem}.old-{number}{suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def check_zero(recipe: Recipe, launch: Launch | None, arguments: "SFTConfig") -> int:
    """The ZeRO stage that is really on (0 without DeepSpeed).

    Raises:
        UserError: where DeepSpeed was asked for and is off, or the stage cannot do what the recipe wants.
    """
    plugin = arguments.deepspeed_plugin
    if launch is not None and launch.deepspeed and plugin is None:
        raise UserError(
            "distributed_type: DeepSpeed was asked for and is off (accelerate turns it off where ACCELERATE_USE_CPU is set "
            "by --cpu); use accelerate_configs/cpu_zero2.yaml on a CPU"
        )
    stage = plugin.zero_stage if plugin is not None else 0
    if plugin is not None and recipe.method != "full" and arguments.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"optim: {arguments.optim.value} is not kept by DeepSpeed's checkpoints here; set optim: adamw_torch"
        )
    if recipe.model.get("use_dora") and stage == 3 and recipe.bits:
        raise UserError(
            f"use_dora: under ZeRO-3 DoRA cannot take the norms of a base in {recipe.bits} bits; leave out "
            f"load_in_{recipe.bits}bit, or use accelerate_configs/zero2.yaml"
        )
    return stage


def open_output(recipe: Recipe, arguments: "SFTConfig") -> Path | None:
    """Makes the folder ready (rank 0) and returns the checkpoint to go on from, the same one on every rank.

    Raises:
        UserError: where another run writes there, there are checkpoints and none is whole, or the folder cannot be written.
    """
    from carelm.training import checkpoints

    folder, problem, newest, aside = recipe.output_dir, None, None, None
    if rank() == 0:
        try:
            anew = restarts(recipe)
            if folder.exists() and not anew:
                newest = checkpoints.newest_whole(folder)
            if folder.exists() and lock(folder) and not anew:
                newest = checkpoints.newest_whole(folder)  # the run that held it has gone on meanwhile
            if folder.exists() and anew:
                aside = free_name(folder)
                folder.rename(aside)
                say(f"--restart: the earlier run is kept as {aside}")
            if (folder / "recipe.yaml").exists() and _has_saved_nothing(folder):
                say(f"{folder} holds a run that ended before its first checkpoint; it begins anew")
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            for name in (CHATS, FEEDBACK, ANSWERS, "embedder", "index") if aside else ():  # which are no run's
                if (aside / name).exists():
                    (aside / name).rename(folder / name)
                    say(f"--restart: {name} stays in {folder}")
            if newest is not None:
                _say_other_length(recipe, read_yaml(folder / "recipe.yaml"))
            if recipe.restart and "SLURM_JOB_ID" in os.environ:
                (folder / RESTARTED).write_text(os.environ["SLURM_JOB_ID"])
            save_recipe(recipe, folder / "recipe.yaml")
            if newest is not None:
                say(f"going on from {newest}")
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"output_dir: {folder} cannot be written ({error.strerror})"
    problem, newest = share((problem, newest), arguments.device)
    if problem is not None:
        raise UserError(problem)
    return newest


def _say_other_length(recipe: Recipe, before: dict[str, Any]) -> None:
    """The learning rate follows the length, which may change while a run goes on."""
    now = budget(recipe)
    if changed := [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]:
        say(f"another length than before ({', '.join(changed)}): the learning rate follows the new one from here on")


_locks: list[IO[str]] = []


def lock(folder: Path) -> bool:
    """Keeps other runs out of the folder until this process ends; returns whether another one had to be waited for.

    Raises:
        UserError: where another run does not leave it.
    """
    import fcntl

    path = folder / LOCK
    if path.exists() and any(os.path.samestat(os.fstat(held.fileno()), path.stat()) for held in _locks):
        return False  # opening it again, and closing it, would give the lock back
    waited, file = False, open(path, "a+")  # noqa: SIM115 - stays open as long as this process
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # POSIX allows both for a lock that is held
            file.seek(0)
            holder = file.read().strip() or "another process"
            if "CARELM_STATUS_FILE" in os.environ and f"job {os.environ['SLURM_JOB_ID']}," in holder:
                break  # an earlier start of this job, on a node that is lost
            if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > until:
                raise UserError(_in_use(folder, holder)) from None
            waited = True
            time.sleep(1)
        except OSError:  # a file system without locks
            break
    _locks.append(file)
    file.truncate(0)
    job = ""
    if "CARELM_STATUS_FILE" in os.environ:  # slurm/train.sh knows its own by it
        start = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
        job = f"job {os.environ['SLURM_JOB_ID']}, start {start}, "
    file.write(f"{job}process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return waited


def keep_others_out(folder: Path) -> None:
    """The lock of a folder that is made where there is none, as every rank is told.

    Raises:
        UserError: where another process writes there, or this one cannot.
    """
    problem = None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"output_dir: {folder} cannot be written ({error.strerror})"
    if (problem := share(problem)) is not None:
        raise UserError(problem)


def finish(recipe: Recipe, metrics: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Writes the data report, the model card and, last, the metrics; publishes."""
    from carelm.training import tensorboard

    folder = recipe.output_dir
    metrics = metrics | {"budget": budget(recipe), "versions": versions(), "git_commit": git_commit()}
    metrics["card_notes"] = recipe.card_notes
    metrics |= finished.describe(folder)
    try:
        write_whole(folder / "data_report.json", json.dumps(report, ensure_ascii=False, indent=1))
        write_whole(folder / "README.md", hub.model_card(recipe, metrics, report))
        if tensorboard.is_wanted(recipe):
            tensorboard.write_final(folder, recipe.keys(), metrics)
        write_whole(folder / finished.METRICS, json.dumps(metrics, indent=1))
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror}); make room and run again") from None
    return publish(recipe, metrics)


def publish(recipe: Recipe, metrics: dict[str, Any]) -> dict[str, Any]:
    """Pushes a finished run to the Hub (rank 0), where the recipe says so and its metrics do not say that it is there. Its
    card is written anew where the recipe has other `card_notes`."""
    if rank() == 0 and metrics.get("card_notes") != recipe.card_notes:
        metrics = {k: v for k, v in metrics.items() if k != "pushed_to"} | {"card_notes": recipe.card_notes}
        report = read_json(recipe.output_dir / "data_report.json")
        write_whole(recipe.output_dir / "README.md", hub.model_card(recipe, metrics, report))
        write_whole(recipe.output_dir / finished.METRICS, json.dumps(metrics, indent=1))
        say(f"{recipe.output_dir / 'README.md'} has the new card_notes")
    if recipe.training.get("push_to_hub") and "pushed_to" not in metrics and rank() == 0:
        metrics = metrics | {"pushed_to": hub.push(recipe)}
        write_whole(recipe.output_dir / finished.METRICS, json.dumps(metrics, indent=1))
        say(f"pushed to {metrics['pushed_to']}")
    return metrics
