"""What the batch scripts in slurm/ ask before they start a rank. Imports no torch, but to prefetch.

python -P -m carelm.cluster.job check RANKS WORDS        the output folder, or what is wrong
python -P -m carelm.cluster.job keep RANKS LINK WORDS    the job's own copy of code and recipes
python -P -m carelm.cluster.job locate FILE              where a name leads
python -P -m carelm.cluster.job prefetch WORDS           downloads what nodes without internet need

RANKS are those of a training, 0 for an evaluation. WORDS are those of train/sft.py: --config RECIPE [--config OVERLAY ...]
[--key value ...]
"""

import os
import shutil
import sys
from pathlib import Path

from carelm import files, ranks
from carelm.command_line import split_command_line
from carelm.errors import UserError
from carelm.provenance import git_commit
from carelm.recipe import Recipe, micro_batch_size
from carelm.recipe_file import load_recipe, read_layers

KEPT = ("carelm", "train", "eval", "slurm", "recipes", "demo", "accelerate_configs", "ds_configs")


def main() -> None:
    task, *words = sys.argv[1:]
    if task == "prefetch":
        prefetch(load_recipe(words, usage=__doc__))
    elif task == "locate":
        print(files.locate(words[0]))
    elif task == "keep":
        number, link, *words = words
        output = check(int(number), words)
        print(keep(with_whole_path_of_data(words), output.parent, Path(link)))
    else:
        print(check(int(words[0]), words[1:]))


def check(number: int, words: list[str]) -> Path:
    """The output folder of a recipe that can be trained on so many ranks; 0 for an evaluation."""
    recipe = load_recipe(words, usage=__doc__)
    if number:
        micro_batch_size(recipe, number)
    return recipe.output_dir.resolve()


def keep(words: list[str], beside: Path, link: Path) -> Path:
    """Copies the code and the recipes of a job to `beside`/.code/JOB, where every start of the job runs them.

    In the folder stand the commit (COMMIT), the project that it is a copy of (ORIGIN) and the job's command line with the
    copied recipes in it (WORDS, each ended by a zero byte). Bases are not copied: a result names its base and outlives the
    job; one that has changed is refused by its fingerprint. `link` is made last, for later starts to find the folder.

    Raises:
        UserError: where the folder or the link cannot be written.
    """
    job = os.environ["SLURM_JOB_ID"]
    folder, aside = beside / ".code" / job, beside / ".code" / f"{job}.partial"
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)  # an earlier job of this number
    try:
        if not folder.exists():
            shutil.rmtree(aside, ignore_errors=True)  # an earlier start was killed in the middle
            for place in KEPT:
                ignored = shutil.ignore_patterns("__pycache__", *(["base"] if place == "demo" else []))
                shutil.copytree(files.ROOT / place, aside / place, ignore=ignored)
            words = _keep_recipes(words, aside / "given", folder / "given")
            (aside / "COMMIT").write_text(f"{git_commit() or ''}\n")
            (aside / "ORIGIN").write_text(str(files.ROOT))
            (aside / "WORDS").write_text("".join(f"{word}\0" for word in words))
            aside.rename(folder)
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
    except OSError as error:
        raise UserError(
            f"output_dir: a job keeps a copy of its code in {folder.parent} and a link to it beside its log, and "
            f"{error.filename or folder} cannot be written ({error.strerror or error}); set output_dir, or sbatch --output, to "
            "a folder that you can write to"
        ) from None
    return folder


def with_whole_path_of_data(words: list[str]) -> list[str]:
    """The words with the path of data that lies beside a recipe: it does not lie beside the recipe's copy."""
    files, given = split_command_line(words)
    for _, keys in reversed(read_layers(files) if "dataset_name" not in given else []):
        if name := keys.get("dataset_name"):
            return [*words, "--dataset_name", name] if os.path.isabs(str(name)) else words
    return words


def _keep_recipes(words: list[str], aside: Path, later: Path) -> list[str]:
    """Copies every file after --config into a folder of its own in `aside`; the words with their paths in `later`."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    kept, of_config = [], False
    for word in words:
        if word.startswith("--"):
            of_config = word == "--config"
        elif of_config:
            place = Path(str(len(kept)), Path(word).name)
            (aside / place).parent.mkdir(parents=True)
            shutil.copy(files.locate(word), aside / place)
            word = str(later / place)
        kept.append(word)
    return kept


def prefetch(recipe: Recipe) -> None:
    """Everything that a run of this recipe reads from a hub, into the caches of the Hub's own libraries."""
    from huggingface_hub import snapshot_download

    from carelm.data.splits import make_examples

    if os.path.exists(recipe.base):
        ranks.say(f"model_name_or_path: {recipe.base} is here")
    else:
        revision = recipe.revision
        ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"]  # pickled, or not read by transformers
        folder = snapshot_download(recipe.base, revision=revision, ignore_patterns=ignored)
        ranks.say(f"model_name_or_path: {recipe.base} is in {folder}")
    _, reports = make_examples(recipe)
    for other in recipe.mixed.values():
        make_examples(other)
    ranks.say(
        f"dataset_name: {recipe.dataset_name} is here, " + ", ".join(f"{n} {r.rows} rows" for n, r in reports.items())
    )


if __name__ == "__main__":
    ranks.run_main(main)
