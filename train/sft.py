"""Fine-tunes a chat model as one recipe says, from a laptop CPU to many GPUs under DeepSpeed.

    python train/sft.py                                             # the demo: offline, without a GPU
    python train/sft.py --config recipes/shop.yaml --preview 2      # two rows as they will be trained, and the data's report
    python train/sft.py --config recipes/shop.yaml                  # trains it; the same command again goes on
    accelerate launch --config_file accelerate_configs/zero2.yaml train/sft.py --config recipes/shop.yaml      # on several GPUs

Without --config the recipe is recipes/demo.yaml: offline, on whatever the machine has. Of several files a later one wins, key
by key, and --key value over all. The same command again goes on from the newest whole checkpoint; a finished run says so and
changes nothing. The last line on standard output is the run's figures as one JSON object; below it standard error has them for
a person, rounded.

Ctrl-C, SIGTERM, max_hours or a file `stop_request` in the output folder save at the end of the step and stop.

exit status: 0 the run is finished, 2 something in the recipe, the data or the launch is to be mended, 75 it was stopped and
saved (a launcher turns each into its own).
"""

import sys
import time
from pathlib import Path

STARTED = time.time()
sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, files, interrupts, quiet, ranks  # noqa: E402, F401
from carelm.adapter_folder import check_adapter, check_unchanged  # noqa: E402
from carelm.chat import encoder_decoder  # noqa: E402
from carelm.chat.chat import make_chat  # noqa: E402
from carelm.data.report import format_report  # noqa: E402
from carelm.data.sources import stay_offline  # noqa: E402
from carelm.errors import UserError  # noqa: E402
from carelm.keys import MEANT_ONCE  # noqa: E402
from carelm.next_steps import say_next, words_of  # noqa: E402
from carelm.recipe import Recipe, micro_batch_size  # noqa: E402
from carelm.recipe_file import load_recipe  # noqa: E402
from carelm.training import card, hub, learnt, runs, stops  # noqa: E402
from carelm.training.prepared import check_nodes_agree, prepare  # noqa: E402
from carelm.training.preview import preview  # noqa: E402


def main() -> None:
    recipe = load_recipe(sys.argv[1:], usage=__doc__)
    if once := [name for name in ("rate", "certify") if getattr(recipe, name)]:
        raise UserError(f"--{once[0]} is not for this command but for {MEANT_ONCE[once[0]]}; leave it out")
    stay_offline(recipe)
    launch = ranks.check_launch()
    micro_batch_size(recipe, ranks.world_size())  # is refused here where it does not divide
    if not recipe.preview and (finished := runs.find_finished(recipe)):
        ranks.say(f"{recipe.output_dir} holds this run, finished at step {finished['global_step']}; nothing to do")
        return report(recipe, runs.publish(recipe, finished))
    if not recipe.preview:
        runs.check_free(recipe.output_dir)

    goes_on = runs.goes_on(recipe)
    if recipe.adapter and not goes_on:
        check_adapter(recipe)
    chat = make_chat(recipe)
    if recipe.preview:
        return print(preview(recipe, chat, recipe.preview)) if ranks.rank() == 0 else None
    prepared = prepare(recipe, chat)
    ranks.say("data\n" + format_report(prepared.report))
    for sentence in learnt.expect(recipe, prepared):
        ranks.say(sentence)

    import torch

    ranks.check_gpus(launch)
    quiet.silence(has_gpu=torch.cuda.is_available(), is_first_rank=ranks.rank() == 0)
    ranks.use_cpu(launch)
    # Libraries that take seconds, after every check without them.
    from carelm.models import adapters, base, flops, memory
    from carelm.models.precision import choose_precision
    from carelm.training import callbacks, checkpoints, preferences
    from carelm.training.arguments import make_training_args
    from carelm.training.optional import check_optional
    from carelm.training.speed import Speed
    from carelm.training.trainer import Trainer

    if not torch.cuda.is_available():
        ranks.join(recipe.training.get("ddp_timeout", 1800))
    config = base.load_config(recipe)
    overflows = encoder_decoder.overflows_in_fp16(recipe.base, recipe.revision)
    precision = choose_precision(
        recipe.precision, recipe.output_dir, anew=runs.restarts(recipe), overflows_in_fp16=overflows
    )
    base.check_vocabulary(chat, config)
    card_prompts = card.make_prompts(recipe, chat, config)
    shape = adapters.check_base(recipe, goes_on)
    arguments = make_training_args(recipe, prepared, precision, shape)
    check_optional(arguments, shape)
    zero_stage = runs.check_zero(recipe, launch, arguments)
    check_nodes_agree(prepared)
    checkpoint = runs.open_output(recipe, arguments)
    precision.keep(recipe.output_dir)
    stop_requests = stops.StopRequests(recipe, launch)

    begun = checkpoints.read_mark(checkpoint) if checkpoint else None
    if recipe.adapter and begun:
        check_unchanged(recipe, begun["adapter_fingerprint"], checkpoint)
    is_pairs = recipe.objective == "preferences"
    if is_pairs and begun:
        preferences.check_reference(recipe, prepared, precision.name, begun)
    model = adapters.load_model(recipe, chat, precision, zero_stage, begun)
    trainable, total = base.count_parameters(model)
    ranks.say(f"{recipe.method} on {recipe.model['model_name_or_path']} in {precision.name} ({precision.reason}): "
              f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.4%})")  # fmt: skip

    ceiling = flops.matmul_ceiling_of_all(arguments.device, precision.dtype)
    speed = Speed(base.flops_per_token(model), ceiling)
    fingerprint = base.base_fingerprint(recipe.base, recipe.revision)
    kind = preferences.PreferenceTrainer if is_pairs else Trainer
    run = kind(recipe, prepared, chat, fingerprint, stop_requests, model=model, args=arguments,
               callbacks=callbacks.make_callbacks(recipe, prepared, chat, speed))  # fmt: skip
    run.started = STARTED
    run.follow(speed, checkpoint)
    run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stop_requests.watch.pause()

    run.save_result(recipe.output_dir)
    metrics = run.metrics() | speed.metrics()
    metrics |= {
        "seconds_to_first_step": round(speed.first_step_at - STARTED, 2) if speed.first_step_at else None,
        "peak_memory_bytes": memory.peak_memory_bytes(),
        "precision": precision.name,
        "method": recipe.method,
        "bits": recipe.bits,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": round(100 * trainable / total, 4),
        "base_fingerprint": fingerprint,
        "adapter": recipe.adapter,
        "adapter_fingerprint": run.adapter_fingerprint,
        "trained_before": hub.trained_before(recipe),
        "shares": {part: r["share"] for part, r in prepared.report.items() if r["share"] is not None} or None,
        "data_fingerprint": prepared.fingerprint,
        "data_files": prepared.files,
        "card_answers": card.answer(recipe, card_prompts, run),
    }
    ranks.leave()
    if ranks.rank() == 0:
        metrics = runs.finish(recipe, metrics, prepared.report)
        report(recipe, metrics)


def report(recipe: Recipe, metrics: dict) -> None:
    """The figures as one JSON object on standard output, and below it on standard error what a person reads of them."""
    if ranks.rank() == 0:
        ranks.print_result(metrics)
        for sentence in learnt.in_words(recipe, metrics):
            ranks.say(sentence)
        words = words_of(recipe, sys.argv[1:])
        has_test = files.read_json(recipe.output_dir / "data_report.json").get("test", {}).get("used") != 0
        before = (
            ["--models", recipe.adapter, "adapter"] if recipe.adapter else []
        )  # is it better than what it went on from?
        is_served = not encoder_decoder.is_encoder_decoder(recipe.base, recipe.revision)
        say_next(
            *[["eval/run.py", *words, *before]] * has_test,
            ["train/chat.py", *words],
            *[["serve/run.py", *words]] * is_served,
        )


if __name__ == "__main__":
    ranks.run_main(main)
