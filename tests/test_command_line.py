"""What is mistyped on a command line is one line that says what was meant, in every launched file."""

import runpy
import sys

import pytest
import yaml
from conftest import PROJECT

from carelm.errors import UserError
from carelm.recipe_file import load_recipe

SWEEP = "recipes/sweeps/alpha_over_r.yaml"
LINES = [
    ("train/sft.py --confg recipes/demo.yaml", "unknown key 'confg'; did you mean --config?"),
    ("train/sft.py --recipe recipes/demo.yaml", "unknown key 'recipe'; did you mean --config?"),
    ("train/sft.py -config recipes/demo.yaml", "'-config' is not a key: write --config"),
    ("train/sft.py –seed 1", "'–seed' is not a key: write --seed"),
    ("train/sft.py seed=1", "'seed=1' is not a key: write --seed=1"),
    ("train/sft.py --config recipes/demo.yaml seed=1", "'seed=1' is not a key: write --seed=1"),
    ("train/sft.py --config=", "--config takes one file"),
    ("train/sft.py --preview", "--preview: nothing follows it; give a whole number"),
    ("train/sft.py --preview 0", "--preview: 0 is not at least 1; leave it out to train"),
    ("train/sft.py --learning_rate --seed 1", "--learning_rate: nothing follows it; give a number"),
    ("train/sft.py --rate", "--rate is not for this command but for eval/run.py"),
    ("train/sft.py --dry_run", "did you mean --dry_run of train/sweep.py, or --preview 2 of train/sft.py?"),
    ("train/sft.py --config recipes/demos.yaml", "cannot be read (No such file or directory); did you mean recipes/demo."),
    ("train/sft.py --config shp", "see recipes/ for those that come with CareLM"),  # nothing is called like it but .yaml
    ("train/sft.py --config demo", "did you mean recipes/demo.yaml?"),
    ("train/sft.py --config bitext_suport.yaml", "did you mean recipes/datasets/bitext_support.yaml?"),
    ("train/sft.py --config recipes", "recipe recipes cannot be read (Is a directory); name a .yaml file in it"),
    (f"train/sft.py --config {SWEEP}", f"{SWEEP}: 'recipe' is a key of a sweep: python train/sweep.py {SWEEP}"),
    ("train/sft.py --config recipes/overlays/real_base.yaml", "real_base.yaml is an overlay, laid over a recipe: --config R"),
    ("eval/run.py --models", "--models: nothing follows it; give a value"),
    ("eval/run.py --models adaptr", "models: 'adaptr': there is no folder adaptr; did you mean 'adapter'?"),
    ("eval/run.py --models ./recipies", "there is no folder recipies; did you mean 'recipes'?"),
    ("eval/run.py --rate --rate", "--rate stands twice"),
    ("eval/run.py --preview 2", "--preview is not for this command but for train/sft.py"),
    ("eval/run.py --message hi", "unknown key 'message'; did you mean --message of train/chat.py?"),
    ("train/chat.py --mesage hi", "unknown key 'mesage'; did you mean --message of train/chat.py?"),
    ("train/chat.py --message", "--message: expected one argument"),
    ("train/chat.py --message hi --message ho", "--message stands twice"),
    ("train/chat.py --message hi --restart", "--restart is not for this command but for train/sft.py"),
    ("train/chat.py --message hi --models adaptr", "did you mean 'adapter'?"),
    ("train/merge.py", "--adapter is missing: python train/merge.py --adapter outputs/shop --output_dir outputs/shop/merged"),
    ("train/merge.py --adaptr x --output_dir y", "unknown key 'adaptr'; did you mean 'adapter'?"),
    ("train/merge.py --adapter x", "--output_dir is missing: python train/merge.py --adapter x --output_dir x/merged"),
    ("train/merge.py --adapter x --output_dir y --adapter z", "--adapter stands twice"),
    ("train/merge.py --adapter x --output_dir y --onto bse", "--onto: invalid choice: 'bse'"),
    ("train/merge.py --adapter x --output_dir y --num_promts 3", "did you mean --num_prompts of train/merge.py?"),
    (f"train/sweep.py {SWEEP} --dry-run", "unknown key 'dry-run'; did you mean --dry_run of train/sweep.py"),
    (f"train/sweep.py {SWEEP} --preview 2", "--preview is not for a sweep but for train/sft.py"),
    ("train/sweep.py recipes/sweeps", "sweep recipes/sweeps cannot be read (Is a directory); name a .yaml file in it"),
    ("train/sweep.py recipes/demo.yaml", "it is a recipe and no sweep: python train/sft.py --config recipes/demo.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), LINES, ids=[words for words, _ in LINES])
def test_what_is_mistyped_is_one_line_that_says_what_was_meant(words, said, monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", words.split())
    main = runpy.run_path(sys.argv[0])["main"]
    with pytest.raises(UserError) as caught:
        main()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.csv").write_text("q,a\none,two\n")
    return ["--dataset_name", "my.csv"]


def test_without_a_file_other_data_is_not_read_by_what_the_demo_says_of_its_own(rows, capsys):
    recipe = load_recipe([*rows, "--prompt_template", "{q}", "--completion_template", "{a}"], usage="")
    assert (recipe.messages_column, recipe.category_column, recipe.id_column) == (None, None, None)
    assert (recipe.trained_turns, recipe.training["max_steps"]) == ("last", 400)
    assert (recipe.name, str(recipe.output_dir)) == ("my", "outputs/my")
    assert (
        capsys.readouterr().err == "carelm: no --config: all but the keys of the data are those of recipes/demo.yaml\n"
    )
    with pytest.raises(UserError, match="the recipe does not say where the conversations are"):
        load_recipe(rows, usage="")


def test_without_a_file_the_demos_own_data_is_read_as_the_demo_says(capsys):
    demo = load_recipe([], usage="")
    assert capsys.readouterr().err == ""
    for words in (["--dataset_name", "demo/data"], ["--dataset_name", str(PROJECT / "demo/data")], ["--seed", "42"]):
        recipe = load_recipe(words, usage="")
        assert recipe.messages_column == "messages" and recipe.output_dir == demo.output_dir
        assert capsys.readouterr().err == "carelm: no --config: the recipe is recipes/demo.yaml\n"


def test_a_run_s_folder_in_the_place_of_its_recipe_leads_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"recipe run cannot be read .* did you mean run/recipe.yaml\?"):
        load_recipe(["--config", "run"], usage="")


def test_an_overlay_alone_will_do_where_the_keys_say_the_rest(rows):
    words = ["--config", "recipes/overlays/demo_base.yaml", *rows, "--messages_column", "m"]
    assert load_recipe(words, usage="").training["learning_rate"] == 2e-3


def test_a_recipe_without_data_says_which_it_takes_and_reads_them_as_they_are(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model_name_or_path": "demo/base", "documents": ["docs"]}))
    assert load_recipe(["--config", str(tmp_path / "own.yaml")], usage="").messages_column == "messages"
    assert "the recipe names no data: the demo's is taken; set dataset_name" in capsys.readouterr().err
