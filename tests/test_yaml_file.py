"""What people write by mistake in a recipe is one line that says what to write."""

import pytest

from carelm.errors import UserError
from carelm.recipe_file import load_recipe

HEAD = "model_name_or_path: demo/base\ndataset_name: demo/data\nmessages_column: messages\n"
TEMPLATES = HEAD.replace("messages_column: messages\n", 'completion_template: "{reply}"\n')
SLIPS = {
    HEAD + "\tlearning_rate: 1e-4\n": "line 4 is not YAML: it begins with a tab; use spaces, not tabs",
    HEAD + "max_steps:\u00a05\nseed: 4\n": "line 4 is not YAML: it holds a blank that does not break a line",
    HEAD + "learning_rate:2e-4\n": "line 4 is not YAML: a blank is missing after the colon; write key: value",
    "learning_rate:2e-4\n": "holds no `key: value` lines: a blank is missing after the colon",
    HEAD + "max_steps = 5\nseed: 4\n": "line 4 is not YAML: it has = after the key",
    HEAD + " max_steps: 5\n": "line 4 is not YAML: a key stands at the beginning of its line",
    HEAD + "system_prompt: @shop helps\n": "the value begins with a sign that YAML uses itself",
    TEMPLATES + "prompt_template: {question}\n": "a text that begins with { stands in quotes",
    TEMPLATES
    + "prompt_template: {question} please\n": "line 4 is not YAML: a text with a colon or a brace stands in quotes",
    TEMPLATES
    + "prompt_template: Ask: {question}\n": "line 4 is not YAML: a text with a colon or a brace stands in quotes",
    TEMPLATES + "prompt_template: {{question}}\n": "line 4 has a brace in a text without quotes",
    TEMPLATES + 'prompt_template: "{question}" please\n': "line 4 is not YAML: text follows the closing quote",
    TEMPLATES + 'prompt_template: "{question}\nseed: 4\n': "line 4 is not YAML: a quote is opened there and not closed",
    TEMPLATES
    + "prompt_template: “{question}”\n": 'line 4 has “ in the place of a quote; write plain ones: "{question}"',
    TEMPLATES + "prompt_template: Ticket #{question}\n": "(outside of them # begins a comment)",
    HEAD + "labels: [“yes”, “no”]\n": 'write plain ones: "yes"',
    HEAD + "load_in_4bit: yes\n": "'yes' is not of type bool; write true or false",
    HEAD + "learning_rate: 2,0e-4\n": "write it with a point: 2.0e-4",
    HEAD + "test_fraction: 10%\n": "write it as a fraction: 0.1",
    HEAD + "max_length: 1,024\n": "write it without separators: 1024",
    HEAD + 'output_dir: "C:\\Users\\me"\n': "line 4 is not YAML: \\ within double quotes begins an escape; write /",
    HEAD + 'output_dir: "runs\\tea"\n': "which \\ within double quotes makes in YAML; write / in paths",
}


@pytest.mark.parametrize("text", SLIPS, ids=SLIPS.values())
def test_a_slip_in_a_recipe_is_one_line_that_says_what_to_write(tmp_path, text):
    (tmp_path / "shop.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_recipe(["--config", str(tmp_path / "shop.yaml")], usage="")
    assert SLIPS[text] in str(refused.value) and "\n" not in str(refused.value)


def test_a_decimal_comma_on_the_command_line_is_to_be_a_point():
    with pytest.raises(UserError, match=r"--learning_rate: '1,5' is not of type float; write it with a point: 1\.5$"):
        load_recipe(["--learning_rate", "1,5"], usage="")


def test_a_recipe_in_another_encoding_names_the_line_and_one_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_bytes((HEAD + "system_prompt: Grüße\n").encode("cp1252"))
    with pytest.raises(UserError, match="line 4 is not YAML: it is no UTF-8; save the file as UTF-8"):
        load_recipe(["--config", str(file)], usage="")
    file.write_bytes((HEAD + "system_prompt: Grüße\n").replace("\n", "\r\n").encode("utf-8-sig"))
    assert load_recipe(["--config", str(file)], usage="").system_prompt == "Grüße"


def test_what_looks_like_a_slip_and_is_none_is_read(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_text(
        HEAD + "card_notes: |\n  At 12:30 a=b “or not”:\n  \tcode {x}\nsystem_prompt: '“Quoted” as we say “here”'\n"
        "labels: [yes, no]  # 50% each\nlearning_rate: 1.5e-4\n", encoding="utf-8"
    )  # fmt: skip
    recipe = load_recipe(["--config", str(file)], usage="")
    assert recipe.labels == ["yes", "no"] and recipe.system_prompt.startswith("“") and "\tcode" in recipe.card_notes
