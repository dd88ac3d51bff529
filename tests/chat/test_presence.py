"""Every message of a row stands in what the model sees, or the row is refused with the role or key that the template drops."""

import copy

import pytest

from carelm.chat.chat import FORGOTTEN, Chat
from carelm.data.example import Example
from carelm.errors import UserError

HEAD = "<|start_header_id|>{{ m.role }}<|end_header_id|>"
ASK = "{{ '<|start_header_id|>assistant<|end_header_id|>' if add_generation_prompt }}"


@pytest.fixture
def chat(tokenizer):
    def chat(body, head="", trained_turns="last"):
        own = copy.copy(tokenizer)
        own.chat_template = f"{head}{{% for m in messages %}}{body}{{% endfor %}}{ASK}"
        return Chat(own, trained_turns=trained_turns, max_length=10**6)

    return chat


def say(role, content="", **more):
    return {"role": role, "content": content, **more}


def render(chat, *messages, tools=None, trained_turns="last"):
    messages = list(messages)
    (r,), counts = chat.render(
        [Example(messages[:-1], messages[-1:], id="1", category=None, source="r:1", tools=tools)]
    )
    return chat.tokenizer.decode(r.input_ids), counts


def call(**arguments):
    return [{"type": "function", "function": {"name": "find_order", "arguments": arguments}}]


PLAIN = HEAD + "{{ m.content }}<|eot_id|>"
ANSWERED = (say("user", "Hi"), say("assistant", "Yes."))


@pytest.mark.parametrize(
    "body, role, messages",
    [
        ("{% if m.role != 'system' %}" + PLAIN + "{% endif %}", "system", [say("system", "Be kind."), *ANSWERED]),
        ("{% if m.role != 'tool' %}" + PLAIN + "{% endif %}", "tool", [*ANSWERED, say("tool", "42"), ANSWERED[1]]),
        (
            "{% if m.role != 'system' or loop.first %}" + PLAIN + "{% endif %}",
            "system .message 3 of",
            [say("system", "Be kind."), say("user", "Hi"), say("system", "Be brief."), ANSWERED[1]],
        ),
        (
            "{% if m.role != 'assistant' or loop.last %}" + PLAIN + "{% endif %}",
            "assistant .message 2 of",
            [*ANSWERED, *ANSWERED],  # the same words stand there once
        ),
    ],
)  # fmt: skip
def test_a_message_that_the_template_drops_is_named_by_its_role(chat, body, role, messages):
    with pytest.raises(UserError, match=f"^r:1: the chat template does not write the text of messages of role {role}"):
        render(chat(body), *messages)
    with pytest.raises(UserError, match=role):
        chat(body).fit_prompt(messages[:-1], 100)


def test_a_system_text_may_stand_anywhere(chat):
    body = "{% if m.role != 'system' %}" + PLAIN + "{% endif %}"
    first = "{% for m in messages %}{% if m.role == 'system' %}({{ m.content }}){% endif %}{% endfor %}"
    text, _ = render(chat(body, head=first), ANSWERED[0], say("system", "Be brief."), ANSWERED[1])
    assert text.startswith("(Be brief.)")


@pytest.mark.parametrize(
    "change, content",
    [
        ("m.content.split('</think>')[-1]", "<think>\nOne and one.\n</think>\n\n2"),
        ("m.content.replace('Y', 'y')", "Yes."),
        ("m.content[:40]", "A long answer that this template cuts after forty letters."),
        ("m.content.replace('*', '')", "This is **bold**."),
        ("'' if m.content == 'Hi' else m.content", "Hi"),
    ],
)
def test_a_text_that_the_template_cuts_or_changes_is_refused(chat, change, content):
    body = HEAD + "{{ (" + change + ") if m.role == 'assistant' else m.content }}<|eot_id|>"
    with pytest.raises(
        UserError, match="^r:1: the chat template (cuts or changes|does not write) .* of role assistant"
    ):
        render(chat(body), say("user", "Hi"), say("assistant", content))


@pytest.mark.parametrize("write", ["m.content | trim", "m.content | tojson", "m.content ~ ' '"])
def test_blanks_at_the_ends_and_json_escapes_do_not_count(chat, write):
    body = HEAD + "{{ " + write + " if m.role != 'assistant' else m.content }}<|eot_id|>"
    render(chat(body), say("system", ' Be "kind".\n'), say("user", "é\n\\ 38\t😀"), say("assistant", "Yes.\n- one"))


def test_tools_and_calls_and_thoughts_must_be_written(chat):
    tools = [{"type": "function", "function": {"name": "find_order", "parameters": {}}}]
    called = (say("user", "Where is it?"), say("assistant", tool_calls=call(number="K-38")))
    thought = (say("user", "Hi"), say("assistant", "Yes.", reasoning_content="They greet."))
    plain = chat(PLAIN)
    with pytest.raises(UserError, match="does not write the row's tools; set tools_column"):
        render(plain, *ANSWERED, tools=tools)
    with pytest.raises(UserError, match="does not write 'tool_calls' of messages of role assistant"):
        render(plain, *called)
    with pytest.raises(UserError, match="does not write 'reasoning_content' of messages of role assistant"):
        render(plain, *thought)
    full = chat(
        HEAD + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|eot_id|>",
        head="{% for tool in tools or [] %}{{ tool.function.name }}: {% endfor %}",
    )  # fmt: skip
    assert render(full, *called, tools=tools)[0].startswith("find_order: ")
    assert "<think>They greet.</think>Yes." in render(full, *thought)[0]
    names_only = chat(
        HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|eot_id|>"
    )
    with pytest.raises(UserError, match="does not write 'tool_calls'"):
        render(names_only, *called)


def test_how_many_rows_cannot_be_written_is_said_with_the_first_of_them(chat):
    called = (say("user", "Where is it?"), say("assistant", tool_calls=call(number="K-38")))
    kinds = (ANSWERED, called, ANSWERED, called)
    rows = [
        Example([asked], [said], id="1", category=None, source=f"r:{i}") for i, (asked, said) in enumerate(kinds, 1)
    ]
    with pytest.raises(UserError) as caught:
        chat(PLAIN).render(rows)
    assert str(caught.value).startswith("r:2: the chat template does not write 'tool_calls'")
    assert str(caught.value).endswith("; 2 of 4 rows cannot be written: r:2, r:4")
    with pytest.raises(UserError, match="; 1 of 3 rows cannot be written$"):
        chat(PLAIN).render(rows[:3])


OWN = "{% if messages[0].role != 'system' %}(system: You are Bo, by Base.){% endif %}"


@pytest.mark.parametrize(
    ("head", "body", "own"),
    [
        (OWN, "({{ m.role }}: {{ m.content }})<|eot_id|>", ""),  # another form: it stays beside the user's
        (
            OWN,
            "{% if m.role == 'system' %}(system: {{ m.content }}){% else %}" + PLAIN + "{% endif %}",
            "You are Bo, by Base.",
        ),
        ("(Today: 26 July)", PLAIN, ""),
        ("", PLAIN, ""),
        ("{{ raise_exception('no system') if messages[0].role == 'system' }}", PLAIN, ""),
    ],
)
def test_a_system_message_that_the_template_writes_itself_is_known(chat, head, body, own):
    assert chat(body, head=head).own_system == own


def test_thoughts_of_earlier_answers_may_be_left_out_which_is_counted(chat):
    thought = "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    body = HEAD + thought + "{{ m.content }}<|eot_id|>"
    first, last = (say("assistant", text, reasoning_content=f"Of {text}") for text in ("Hello.", "Yes."))
    text, counts = render(chat(body), say("user", "Hi"), first, say("user", "38?"), last)
    assert "Of Hello." not in text and "Of Yes." in text
    assert counts == {FORGOTTEN: 1}


def test_arguments_are_an_object_or_the_text_that_the_template_wants(chat):
    messages = (say("user", "Where?"), say("assistant", tool_calls=call(number="K-38", note='é "soon"', count=2)))
    wanted = '{"number": "K-38", "note": "é \\"soon\\"", "count": 2}'
    body = HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} WRITE{% endfor %}<|eot_id|>"
    for write in (
        "{{ c.function.arguments | tojson }}",
        "{{ ' ' + c.function.arguments }}",  # fails on an object
        "{{ c.function.arguments }}",  # writes an object as Python does
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    ):
        assert wanted in render(chat(body.replace("WRITE", write)), *messages)[0]
    items = body.replace(
        "WRITE", "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}"
    )
    assert '<note>é "soon"</note>' in render(chat(items), *messages)[0]


def test_a_template_that_fails_in_any_way_is_one_line_with_the_row(chat):
    for fails in ("{{ 1 + m.content }}", "{{ m.content.nothing.at_all }}", "{{ 1 // (m.content | length - 2) }}"):
        with pytest.raises(UserError, match="^r:1: the chat template refuses this conversation .*Error") as raised:
            render(chat("{% if m.content == 'Hi' %}" + fails + "{% endif %}" + PLAIN), *ANSWERED)
        assert "\n" not in str(raised.value)
