"""Merges an adapter into its base: one plain checkpoint for any server, with a certificate of how far it is from the adapter.

    python train/merge.py --adapter outputs/shop --output_dir outputs/shop/merged
    python train/merge.py --adapter outputs/shop --output_dir outputs/shop-bf16 --onto base --dtype bf16
    python train/merge.py --adapter outputs/shop --output_dir outputs/shop/merged --dataset_name data/tickets.csv

An adapter that was trained on a quantised base can be merged onto the whole weights of the base (--onto base) or onto the
dequantised weights that it was trained on (--onto quantized, the default for such an adapter, and the nearer one). The weights
are merged one file of the base at a time, on the CPU; where an adapter changes the experts of a mixture, the whole model is in
memory, in fp32. merge.json in the folder says how the merged model differs from the adapter on real prompts: mean KL
divergence, which decides, share of same likeliest tokens, and of same whole answers. Of the last there may be few: after the
first other token an answer goes another way. Where --dtype is left out and the merge in the run's own 16 bits does not pass, it
is made again in fp32. The folder appears when it is whole.

Other keys of a recipe may follow, where the data or the base have moved since: --key value.

exit status: 0 the checkpoint is there, 1 it is beyond its tolerance (and is not left behind), 2 something is to be mended.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, quiet, ranks  # noqa: F401
from carelm.adapter_folder import adapter_fingerprint
from carelm.chat.encoder_decoder import overflows_in_fp16
from carelm.command_line import own_options, own_parser
from carelm.data.sources import stay_offline
from carelm.errors import UserError
from carelm.files import made_whole, write_whole
from carelm.next_steps import say_next
from carelm.recipe_file import load_recipe
from carelm.training.checkpoint_folders import find_recipe
from carelm.training.runs import free_name, untrained


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = own_parser(__doc__)
    parser.add_argument("--adapter", type=Path, help="folder of a finished run, or a checkpoint in it")
    parser.add_argument("--output_dir", type=Path, help="folder to make")
    parser.add_argument("--onto", choices=("base", "quantized"), help="default: quantized where the base was")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the run's precision, and fp32 where that "
                        "does not pass")  # fmt: skip
    parser.add_argument("--num_prompts", type=int, default=32, help="test questions for the certificate, which loads the "
                        "whole model; 0 for none (default: 32)")  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, help="largest mean KL, in nats (default: by bits, --onto and --dtype)"
    )
    return own_options(parser)


def main() -> None:
    """What is wrong with the adapter is said of the key that names it here; the evaluator has it in `models`."""
    try:
        make()
    except UserError as error:
        raise UserError(re.sub("^models:", "--adapter:", str(error))) from None


def make() -> None:
    options, keys = parse()
    if not (options.adapter and options.output_dir):
        missing, of = ("output_dir", options.adapter) if options.adapter else ("adapter", "outputs/shop")
        raise UserError(f"--{missing} is missing: python train/merge.py --adapter {of} --output_dir {of}/merged")
    if not (options.adapter / "adapter_config.json").exists():
        if (options.adapter / "config.json").exists() and any(options.adapter.glob("*.safetensors")):
            raise UserError(
                f"--adapter: {options.adapter} is a whole model already: nothing is to be merged, use it as it is"
            )
        is_run = (options.adapter / "recipe.yaml").exists()
        hint = untrained(options.adapter) if is_run else "name the folder of a finished run"
        raise UserError(f"--adapter: {options.adapter} holds no adapter_config.json; {hint}")
    if not any(key.partition("=")[0] == "--config" for key in keys):
        saved = find_recipe(options.adapter)
        if saved is None:
            raise UserError(f"--adapter: {options.adapter} has no recipe.yaml; name its recipe with --config")
        keys = ["--config", str(saved), *keys]
    if options.num_prompts < 0 or (options.tolerance or 0) < 0:
        raise UserError("--num_prompts and --tolerance: neither can be below 0")
    recipe = load_recipe(keys, usage=__doc__, first=("output_dir",))
    stay_offline(recipe)

    import torch
    from safetensors import SafetensorError

    quiet.silence(has_gpu=torch.cuda.is_available(), is_first_rank=True)
    ranks.use_cpu(None)
    from carelm import files
    from carelm.evaluation import candidates, certificate, same_answers
    from carelm.evaluation.questions import make_questions
    from carelm.models import merge
    from carelm.models.precision import choose_precision
    from carelm.training import checkpoints

    adapter = candidates.find(recipe, str(options.adapter), is_own=True)
    adapter.check_base()
    adapter.check_finite()
    saved = find_recipe(options.adapter)
    run = saved.parent if saved else options.adapter
    overflows = overflows_in_fp16(adapter.recipe.base, adapter.recipe.revision)
    here = choose_precision(recipe.precision, run, training=False, overflows_in_fp16=overflows).name
    adapter = adapter.computing_in(here)
    precision = files.read_json(options.adapter / "train_metrics.json").get("precision") or here
    held = dataclasses.replace(adapter.recipe, precision=precision)
    onto = options.onto or ("quantized" if held.bits else "base")
    if onto == "quantized" and not held.bits:
        raise UserError(f"--onto quantized: {options.adapter} was trained on whole weights; use --onto base")
    dtypes = [options.dtype] if options.dtype else list(dict.fromkeys((precision, "fp32")))
    about = {"onto": onto, "adapter": adapter_fingerprint(options.adapter), "bits": held.bits}

    def computing(dtype: str) -> str:
        """Whole weights in fp32 are checked in fp32: in 16 bits the adapter's own answers are rounded too."""
        return "fp32" if dtype == "fp32" and not held.bits else here

    def tolerance(dtype: str) -> float:
        by_dtype = certificate.tolerance(onto, held.bits, dtype, computing(dtype))
        return by_dtype if options.tolerance is None else options.tolerance

    there = files.read_json(options.output_dir / "merge.json")
    if there.get("dtype") in dtypes and all(there.get(key) == value for key, value in about.items()):
        allowed = tolerance(there["dtype"])
        if options.num_prompts and not (there["mean_kl"] is not None and there["mean_kl"] <= allowed):
            raise UserError(
                f"--tolerance: {options.output_dir} holds this merge with a mean KL of {there['mean_kl']}, not within "
                f"{allowed:g}; remove the folder to merge again, or accept more"
            )
        ranks.say(f"{options.output_dir} holds this merge; nothing to do")
        return ranks.print_result(there)
    if options.output_dir.exists() and there.get("adapter", about["adapter"]) == about["adapter"]:
        raise UserError(f"--output_dir: {options.output_dir} is there already; name another folder")
    questions = []
    if options.num_prompts:
        questions, _ = make_questions(recipe, adapter.make_chat())
        questions = questions[:: max(1, len(questions) // options.num_prompts)][: options.num_prompts]

    with made_whole(options.output_dir, SafetensorError) as aside:
        for dtype in dtypes:
            merge.merge_weights(held, options.adapter, aside, onto, dtype)
            merge.save_beside(held, options.adapter, adapter.make_chat(), aside)
            allowed = tolerance(dtype)
            result = {**about, "dtype": dtype, "tolerance": allowed, "prompts": 0, "mean_kl": None}
            if not questions:
                ranks.say("no certificate was asked for: how far the merge is from its adapter is not known")
                break
            asked = dataclasses.replace(adapter.recipe, precision=computing(dtype))
            both = dataclasses.replace(adapter, recipe=asked), candidates.find(recipe, f"{aside}@{dtype}")
            near = certificate.certify(*both, questions, recipe.sample_max_new_tokens)
            result |= dataclasses.asdict(near)
            ranks.say(f"check of the merge in {dtype} against the adapter: {same_answers.describe(result)}")
            if near.mean_kl <= allowed:
                break
            if dtype != dtypes[-1]:
                ranks.say(f"{dtype} rounds the merged weights too much for this adapter, so it is merged again in fp32: twice "
                          f"the size, and checked in fp32 (--dtype {dtype} would end here, without a merge)")  # fmt: skip
                shutil.rmtree(aside)
        else:
            worth = ["--onto quantized"] * (onto == "base" and bool(held.bits)) + ["--dtype fp32"] * (dtype != "fp32")
            advice = f"{' and '.join(worth)} {'are' if worth[1:] else 'is'} nearer and worth trying; " if worth else ""
            print(f"error: the merge is beyond its tolerance; {options.output_dir} is not made. {advice}--tolerance "
                  "accepts more", file=sys.stderr)  # fmt: skip
            sys.exit(1)
        checkpoints.settle(aside.iterdir())
        write_whole(aside / "merge.json", json.dumps(result, indent=1))
        if options.output_dir.exists():
            earlier = free_name(options.output_dir)
            options.output_dir.rename(earlier)
            ranks.say(f"the merge of an earlier adapter is kept as {earlier}")
    ranks.print_result(result)
    ranks.say(f"merged: {options.output_dir}")
    models = (
        []
        if options.output_dir == options.adapter / "merged"
        else ["base", str(options.adapter), str(options.output_dir)]
    )
    say_next(
        ["eval/run.py", *keys, *(["--models", *models] if models else [])],
        ["train/chat.py", *keys, "--models", str(options.output_dir)],
        *[["serve/run.py", *keys, *(["--models", *models] if models else [])]] * (not adapter.is_encoder_decoder),
    )


if __name__ == "__main__":
    ranks.run_main(main)
