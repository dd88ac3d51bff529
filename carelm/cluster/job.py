"""What the batch scripts in slurm/ ask before they start a rank. Imports no torch, but to prefetch.

python -m carelm.cluster.job check RANKS --config RECIPE [--key value ...]    the output folder, or what is wrong; RANKS of a
                                                                      training, 0 for an evaluation
python -m carelm.cluster.job prefetch --config RECIPE [--key value ...]       downloads base and data for nodes without internet
"""

import sys

from carelm import ranks
from carelm.recipe import Recipe, micro_batch_size
from carelm.recipe_file import load_recipe


def main() -> None:
    task, *words = sys.argv[1:]
    if task == "prefetch":
        prefetch(load_recipe(words, usage=__doc__))
    else:
        recipe = load_recipe(words[1:], usage=__doc__)
        if int(words[0]):
            micro_batch_size(recipe, int(words[0]))
        print(recipe.output_dir.resolve())


def prefetch(recipe: Recipe) -> None:
    """Everything that a run of this recipe reads from a hub, into the caches of the Hub's own libraries."""
    import os

    from huggingface_hub import snapshot_download

    from carelm.data.splits import make_examples

    if os.path.exists(recipe.base):
        ranks.say(f"model_name_or_path: {recipe.base} is here")
    else:
        revision = recipe.model.get("model_revision", "main")
        ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"]  # pickled, or not read by transformers
        folder = snapshot_download(recipe.base, revision=revision, ignore_patterns=ignored)
        ranks.say(f"model_name_or_path: {recipe.base} is in {folder}")
    _, reports = make_examples(recipe)
    ranks.say(
        f"dataset_name: {recipe.dataset_name} is here, " + ", ".join(f"{n} {r.rows} rows" for n, r in reports.items())
    )


if __name__ == "__main__":
    ranks.run_main(main)
