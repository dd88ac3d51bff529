"""A template renders the same on every day, in every server, or is refused in one true line."""

import json
import shutil

import pytest

from carelm.chat.chat import Chat
from carelm.chat.template import settle
from carelm.chat.tokenizer import load_tokenizer
from carelm.errors import UserError

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def load(base, tmp_path):
    """The tokenizer of a folder that holds the base's and a chat template of our own."""

    def load(template, **config):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, tmp_path / name)
        (tmp_path / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if "chat_template" in config:
            (tmp_path / "chat_template.jinja").unlink()
        return load_tokenizer(str(tmp_path), revision="main", trust_remote_code=False, template_file=None)

    return load


def load_file(base, tmp_path, content):
    path = tmp_path / "own.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_tokenizer(str(base), revision="main", trust_remote_code=False, template_file=str(path))


# Dates


@pytest.mark.parametrize(
    "call, day",
    [
        ("strftime_now('%d %b %Y')", "26 Jul 2024"),
        ("strftime_now('%Y-%m-%d')", "2024-07-26"),
        ('strftime_now("%B %d, %Y")', "July 26, 2024"),
        ("strftime_now(format='%d %B %Y')", "26 July 2024"),
        ("strftime_now('%A, %H:%M') + '!'", "Friday, 00:00!"),
        ("strftime_now('%d' ~ '/%m')[:5]", "26/07"),
        ("strftime_now('it\\'s %Y')", "it's 2024"),
        ("strftime_now('%Y') if strftime_now is defined else '1999'", "2024"),
    ],
)
def test_each_literal_format_gives_the_fixed_day_in_that_format(load, call, day):
    tokenizer = load("  {{ " + call + " }}\n" + TURNS)
    assert Chat(tokenizer, max_length=64).text(QUESTION) == f"  {day}\nuser: Hi<|eot_id|>"


def test_several_formats_inside_loops_and_macros_each_give_their_own(load):
    template = (
        "{% macro day() %}{{ strftime_now('%d.%m.%Y') }}{% endmacro %}{{ day() }} "
        "{% for m in messages %}{{ strftime_now('%b') }} {{ m.content }}<|eot_id|>{% endfor %}"
    )
    assert Chat(load(template), max_length=64).text(QUESTION) == "26.07.2024 Jul Hi<|eot_id|>"


def test_the_first_line_of_a_dated_template_keeps_its_blanks(load):
    assert Chat(load("\n\n{{ strftime_now('%Y') }}" + TURNS), max_length=64).text(QUESTION).startswith("\n\n2024user")
    assert (
        Chat(load("  {% if true %}{{ strftime_now('%Y') }}{% endif %}" + TURNS), max_length=64)
        .text(QUESTION)
        .startswith("2024user")
    )


@pytest.mark.parametrize(
    "use",
    [
        "{{ strftime_now(day_format) }}",
        "{{ strftime_now() }}",
        "{{ strftime_now(messages[0].content) }}",
        "{{ strftime_now('%Y', 1) }}",
        "{% set today = strftime_now %}{{ today('%Y') }}",
        "{{ {'now': strftime_now}.now('%Y') }}",
    ],
)
def test_a_format_that_is_not_literal_is_refused(load, use):
    with pytest.raises(UserError, match="line 2 uses strftime_now with no literal format"):
        load(TURNS + "\n" + use)


def test_the_fixed_template_is_saved_with_the_result_and_is_not_fixed_twice(load, tmp_path):
    tokenizer = load("{{ strftime_now('%Y') }}" + TURNS)
    tokenizer.save_pretrained(tmp_path / "result")
    saved = (tmp_path / "result/chat_template.jinja").read_text()
    assert saved == tokenizer.chat_template == settle(saved, "")
    from transformers import AutoTokenizer

    served = AutoTokenizer.from_pretrained(tmp_path / "result")
    assert served.apply_chat_template(QUESTION, tokenize=False) == "2024user: Hi<|eot_id|>"


def test_a_template_without_a_date_is_left_as_it_is(base):
    template = (base / "chat_template.jinja").read_text()
    assert settle(template, "") == template


# Files


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{% for m in messages %}{{ m.content }}", "own.jinja, line 1 is no Jinja .*endfor"),
        ("\n\n{{ messages | no_such_filter }}", "own.jinja, line 3 is no Jinja .*no_such_filter"),
        ("Grüße".encode("latin-1") + TURNS.encode(), "own.jinja is not UTF-8 .byte 2 is 0xfc.; save it as UTF-8"),
        (("\ufeff" + TURNS).encode("utf-16"), "own.jinja is not UTF-8"),
        (b"\xef\xbb\xbf" + TURNS.encode(), "own.jinja begins with a byte order mark"),
        (" \n", "own.jinja is empty"),
    ],
)
def test_a_template_file_that_cannot_be_used_is_one_line(base, tmp_path, content, reason):
    with pytest.raises(UserError, match=f"^chat_template_path: .*{reason}") as raised:
        load_file(base, tmp_path, content)
    assert "\n" not in str(raised.value) and "set chat_template_path" not in str(raised.value)


def test_a_folder_with_a_broken_template_is_named_as_the_bases(load):
    with pytest.raises(UserError, match="^model_name_or_path: .*line 1 is no Jinja"):
        load("{% endif %}")
    with pytest.raises(UserError, match="^model_name_or_path: .*byte order mark"):
        load(b"\xef\xbb\xbf" + TURNS.encode())
    with pytest.raises(UserError, match="^model_name_or_path: .*utf-8"):
        load("é".encode("latin-1"))


def test_named_templates_need_a_default_and_each_of_them_is_fixed(load):
    named = [{"name": name, "template": "{{ strftime_now('%Y') }}" + TURNS} for name in ("rag", "tool_use")]
    with pytest.raises(UserError, match="one of rag, tool_use, none of them called default; .*set chat_template_path"):
        load("", chat_template=named)
    tokenizer = load("", chat_template=[*named, {"name": "default", "template": "{{ strftime_now('%m') }}" + TURNS}])
    chat = Chat(tokenizer, max_length=64)
    assert chat.text(QUESTION) == "07user: Hi<|eot_id|>"
    assert chat.tokenizer.apply_chat_template(QUESTION, chat_template="rag", tokenize=False).startswith("2024user")


# The end of turn


def test_the_end_of_turn_stands_after_the_answers_text_not_in_its_header(load):
    header = "{{ '<|start_header_id|>assistant' if add_generation_prompt }}"
    template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}"
        "{{ '<|end_header_id|>final' if m.role == 'assistant' }}<|end_header_id|>{{ m.content }}<|eot_id|>"
        "{% endfor %}" + header
    )
    tokenizer = load(template)
    assert Chat(tokenizer, max_length=64).end_of_turn_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_an_added_token_that_is_flagged_special_ends_a_turn_though_the_config_does_not_name_it(load):
    tokenizer = load(TURNS, eos_token="<|end_of_text|>", extra_special_tokens=["<|start_header_id|>"])
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end not in tokenizer.all_special_ids
    assert Chat(tokenizer, max_length=64).end_of_turn_id == end


def test_a_template_that_does_not_write_answers_is_refused(load):
    silent = load("{% for m in messages if m.role == 'user' %}{{ m.content }}<|eot_id|>{% endfor %}")
    with pytest.raises(UserError, match="does not write an answer's text as it is"):
        Chat(silent, max_length=64)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", '{"version": "1.0"}', "no tokenizer can be loaded from .*added_tokens"),
        ("tokenizer_config.json", "[]", "no tokenizer can be loaded from"),
        (
            "tokenizer_config.json",
            '{"chat_template": 3}',
            "the chat template of .* is no text but 3; set chat_template_path",
        ),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_one_line(base, tmp_path, name, content, reason):
    for whole in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / whole, tmp_path / whole)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^model_name_or_path: {reason}") as raised:
        load_tokenizer(str(tmp_path), revision="main", trust_remote_code=False, template_file=None)
    assert "\n" not in str(raised.value)
