"""Compares models on a recipe's test split: base, adapter and merged checkpoints, with figures that can be trusted.

    python eval/run.py
    python eval/run.py --config recipes/datasets/bitext_support.yaml --config recipes/overlays/demo_base.yaml
    python eval/run.py --config recipes/shop.yaml --models base adapter adapter@bf16 outputs/other --num_shots 2
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml eval/run.py --config recipes/shop.yaml
    accelerate launch eval/run.py --config recipes/shop.yaml --rate        # and rate.html: blind pairs, rated by hand
    python eval/run.py --config recipes/shop.yaml --judge NAME --judge_url https://api.openai.com/v1   # and a model judges

Each rank answers its share. Writes OUTPUT_DIR/eval/: results.json, report.html, report.md, predictions-MODEL.jsonl,
judgements-JUDGE.jsonl, recipe.yaml and TensorBoard events. Answers and judgements are kept as they are made: the same command
again goes on where it stopped, and what is there is not made again. The last line on standard output is the comparison as one
JSON object.

exit status: 0 the report is written, 2 something in the recipe, the data, the models or the launch is to be mended.
"""

import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, ranks  # noqa: F401
from carelm.data.sources import stay_offline
from carelm.errors import UserError
from carelm.keys import EVALUATION_KEYS
from carelm.next_steps import chat_words, say_next, words_of
from carelm.recipe_file import load_also_tests, load_recipe, save_recipe


def main() -> None:
    recipe = load_recipe(sys.argv[1:], usage=__doc__, first=EVALUATION_KEYS)
    others = load_also_tests(recipe)
    stay_offline(recipe, *others.values())
    launch = ranks.check_launch_without_zero3()
    from carelm.evaluation import candidates
    from carelm.evaluation.judge import find_judge
    from carelm.evaluation.question_sets import make_question_sets

    models = candidates.find_candidates(recipe)
    ranks.say(f"models: {', '.join(model.name for model in models)}")
    if recipe.rate and len(models) < 2:
        raise UserError("rate: two models are needed, the base and a tuned one; name them in models")
    judge = find_judge(recipe) if recipe.judge else None
    own, *elsewhere = make_question_sets(recipe, others)

    import torch

    ranks.get_ready(launch)
    from carelm.evaluation import answers, api, constrained, judge_results, pace, ratings, report, results, same_answers
    from carelm.evaluation.label_results import Labelled
    from carelm.models.precision import choose_precision
    from carelm.training import runs, stops

    if judge:
        judge.check_is_there()
    if recipe.precision == "auto" and not torch.cuda.is_available():
        precision = choose_precision(recipe.precision, recipe.output_dir, training=False)
        precision.keep(recipe.output_dir)
        ranks.say(f"all models answer in {precision.name} ({precision.reason})")
        models = [model.computing_in(precision.name) for model in models]
    folder = recipe.output_dir / "eval"
    runs.keep_others_out(folder)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # kill -INT ends it also where a script's & has that ignored
    rated = ratings.load(folder)

    def way(model):
        return api if isinstance(model, api.ApiModel) else answers

    def prepare(s, m, earlier):
        if way(m) is api:
            return api.prepare(s.recipe, m, s.questions, folder / s.name)
        into = folder / s.name
        return answers.prepare(s.recipe, m.asked_by(s.recipe), s.questions, into, s.form, s.validation, earlier)

    asked = {}
    for s in (own, *elsewhere):
        asked[s] = [prepare(s, m, [of_set[k] for of_set in asked.values()]) for k, m in enumerate(models)]
    watch = stops.HangWatch(recipe.stall_timeout)
    left = pace.Pace(recipe, sum(len(m.file.made_by) - len(m.file.read()) for each in asked.values() for m in each))
    lines, measured = {}, {}
    for one, of_models in asked.items():
        (folder / one.name).mkdir(parents=True, exist_ok=True)
        if ranks.rank() == 0:
            save_recipe(one.recipe, folder / one.name / "recipe.yaml")
        answered = {
            m.candidate.name: way(m.candidate).answer(one.recipe, m, folder / one.name, watch, left) for m in of_models
        }
        lines[one.name], measured[one.name] = ({name: pair[k] for name, pair in answered.items()} for k in (0, 1))
    ranks.leave()
    if ranks.rank() == 0:
        of_sets = {}
        for s, of_models in asked.items():
            scored = [m for m in of_models if way(m.candidate) is answers]
            labelled = Labelled(s.form, s.validation, {m.candidate.name: constrained.read(m) for m in scored if s.form})
            found = results.make_results(s.recipe, s.questions, lines[s.name], measured[s.name], s.checks, labelled)
            of_sets[s.name] = found | {"test": s.about}
        for s in asked:
            predicted = [c["sentence"] for c in s.about["predicted_columns"].values()]
            of_sets[s.name]["data_cautions"][:0] = [*predicted, *s.about["without_label"], *s.about["earlier_leaks"]]
        of_sets[""]["data_cautions"] += [
            f"{model.name} was trained with other {', '.join(keys)} than this evaluation has."
            for model in models
            if (keys := model.other_data_keys(recipe))
        ]
        of_sets[""]["data_cautions"] += [
            f"{model.name} was trained on other data than is here now ({', '.join(files)}): it may have seen test questions."
            for model in models
            if (files := model.changed_data(recipe))
        ]
        for of_set in of_sets.values():
            of_set["cautions"][:0] = of_set["data_cautions"]
        found = of_sets.pop("") | {"tests": of_sets}
        found["ratings"] = ratings.count(rated, found["models"], own.questions, lines[""])
        if judge:
            asked_of = (found["models"], own.questions, lines[""], rated, folder)
            found["judge"] = judge_results.find(recipe, judge, *asked_of)
        for name, served in candidates.as_served(recipe, models).items():
            found["models"][name]["served"] = served
        found |= {"conditions": answers.conditions(recipe)}
        found = report.write(folder, recipe, found, own.questions, lines[""])
        ranks.print_result(report.summary(folder, found))
        for name, result in found["tests"].items():
            for sentence in result["verdicts"]:
                ranks.say(f"{name}: {sentence}")
        said = same_answers.without(found, found["same"])["verdicts"] + found["cautions"]
        said += [same["sentence"] for same in found["same"].values()]
        for sentence in [*said, *found["besides"], found["headline"]]:
            ranks.say(sentence)
        if recipe.rate:
            asks = f"{recipe.name}: which answer is better?"
            page, number = ratings.write_page(
                folder, asks, found["models"], own.questions, lines[""], recipe.split_seed
            )
            to_rate = f"{number} pairs of answers to rate in a browser: {page}"
            ranks.say(to_rate if page else "rate: both models give the same answers, so there is nothing to rate")
        ranks.say(f"report: {folder / 'report.html'}")
        words, into = words_of(recipe, sys.argv[1:]), recipe.output_dir / "merged"
        steps = [["train/chat.py", *chat_words(words)]]
        if "adapter" in lines[""] and recipe.method == "lora" and not into.exists():
            steps.append(["train/merge.py", "--adapter", str(recipe.output_dir), "--output_dir", str(into)])
        say_next(*steps)


if __name__ == "__main__":
    ranks.run_main(main, kept="the answers so far stay and are not made again")
