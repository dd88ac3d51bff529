"""An encoder-decoder reads a conversation as plain text, and its answer is a text of its own."""

import json

import pytest
import yaml

from carelm.chat.chat import Chat
from carelm.chat.chat import make_chat as chat_of_recipe
from carelm.chat.encoder_decoder import is_encoder_decoder, one_answer_each
from carelm.chat.tokenizer import load_tokenizer
from carelm.data.example import Example
from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.training.prepared import prepare

USER = {"role": "user", "content": "Where is my order HP-57447?"}
TALK = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Good morning."},
    {"role": "assistant", "content": "Hello, Ada."},
    USER,
]


@pytest.fixture(scope="module")
def t5(base):
    return load_tokenizer(str(base.parent / "t5"), revision="main", trust_remote_code=False, template_file=None)


def make_chat(tokenizer, **keys):
    return Chat(tokenizer, is_encoder_decoder=True, **({"max_length": 256} | keys))


def example(*messages, completion=1):
    return Example([*messages[:-completion]], [*messages[-completion:]], id="1", category=None, source="rows.jsonl:1")


def answer(text):
    return {"role": "assistant", "content": text}


def sides(rendered):
    ids, trained = rendered.input_ids, rendered.trained
    return ids[~trained].tolist(), ids[trained].tolist()


def test_system_message_and_earlier_turns_are_plain_text_and_the_answer_stands_alone(t5):
    text = make_chat(t5).text([*TALK, answer("It is late.")])
    assert text == ("You help.\n\nGood morning.\nHello, Ada.\n\nWhere is my order HP-57447?</s>It is late.</s>")


def test_the_encoder_reads_in_training_what_the_evaluator_sends_and_both_sides_end_with_eos(t5):
    chat = make_chat(t5)
    (rendered,), _ = chat.render([example(*TALK, answer("It is late."))])
    asked, told = sides(rendered)
    assert asked == chat.prompt_ids(TALK) and asked[-1] == t5.eos_token_id
    assert told == t5("It is late.")["input_ids"] and told[-1] == t5.eos_token_id


@pytest.mark.parametrize("question, reply", [("Where is it?\n", "It is late."), ("Where\nis it?", "It is\nlate."),
                                             ("Where is it", "\nIt is late."), ("Where is it ", "late")])  # fmt: skip
def test_newlines_which_a_t5_turns_into_blanks_move_no_token_to_the_other_side(t5, question, reply):
    chat = make_chat(t5)
    (rendered,), _ = chat.render([example({"role": "user", "content": question}, answer(reply))])
    asked, told = sides(rendered)
    assert asked == t5(question)["input_ids"] and told == t5(reply)["input_ids"]
    assert chat.spoken(told) == " ".join(reply.split())


def test_each_side_has_the_whole_window(t5):
    row = example(USER, answer("Your order HP-57447 is late, it comes on Friday."))
    (rendered,), _ = make_chat(t5).render([row])
    asked, told = map(len, sides(rendered))
    widest = max(asked, told)
    (fits,), _ = make_chat(t5, max_length=widest).render([row])
    assert fits is not None and asked + told > widest
    (dropped,), counts = make_chat(t5, max_length=widest - 1).render([row])
    assert dropped is None and counts["too long"] == 1
    (cut,), counts = make_chat(t5, max_length=6, too_long="cut").render([row])
    assert tuple(map(len, sides(cut))) == (6, 6) and counts["answer cut"] == counts["prompt cut"] == 1
    assert [side[-1] for side in sides(cut)] == [t5.eos_token_id] * 2


def test_every_trained_answer_is_an_example_and_the_encoder_reads_the_ones_before(t5):
    row = example(TALK[1], TALK[2], USER, answer("It is late."), completion=3)
    chat = make_chat(t5, trained_turns="all")
    rendered, _ = chat.render(one_answer_each(chat, [row]))
    assert [t5.decode(sides(r)[1]) for r in rendered] == ["Hello, Ada.</s>", "It is late.</s>"]
    assert [sides(r)[0] for r in rendered] == [chat.prompt_ids([TALK[1]]), chat.prompt_ids([*TALK[1:]])]
    (last,) = one_answer_each(make_chat(t5, trained_turns="last"), [row])
    assert last.completion == [answer("It is late.")]


def test_a_template_of_ones_own_has_to_end_a_prompt_with_eos(t5, base):
    file = base / "chat_template.jinja"
    own = load_tokenizer(str(base.parent / "t5"), revision="main", trust_remote_code=False, template_file=str(file))
    own.chat_template = own.chat_template.replace("<|eot_id|>", "</s>")
    with pytest.raises(
        UserError, match="^chat_template_path: an encoder's text ends with </s>, and this chat template"
    ):
        make_chat(own)


@pytest.mark.parametrize("kind, why", [("mbart", "language codes"), ("m2m_100", "language codes"),
                                       ("nllb-moe", "language codes"), ("t5gemma", "a chat template"),
                                       ("pegasus", "never tried here")])  # fmt: skip
def test_other_encoder_decoders_are_refused_by_name_before_a_tokenizer_is_looked_for(tmp_path, kind, why):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "is_encoder_decoder": True}))
    with pytest.raises(UserError, match=f"^model_name_or_path: .* is an encoder-decoder .{kind}. that .*{why}"):
        load_tokenizer(str(tmp_path), revision="main", trust_remote_code=False, template_file=None)


def test_a_decoder_alone_is_none(base):
    assert not is_encoder_decoder(str(base)) and is_encoder_decoder(str(base.parent / "t5"))


def test_answers_whose_lines_a_t5_will_run_together_are_counted(base, tmp_path):
    rows = [
        {"q": f"Where is order {i}?", "a": "It is late.\nSorry." if i % 3 == 0 else "It is late."} for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {"dataset_name": str(tmp_path / "rows.jsonl"), "prompt_template": "{q}", "completion_template": "{a}",
            "validation_fraction": 0, "test_fraction": 0}  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(keys))
    notes = {}
    for name in ("t5", "base"):
        recipe = load_recipe(
            ["--config", str(tmp_path / "small.yaml"), "--model_name_or_path", str(base.parent / name)], usage=""
        )
        notes[name] = prepare(recipe, chat_of_recipe(recipe)).report["train"]["notes"]
    assert any(
        "answers of several lines: 10 (first: rows.jsonl:1); this tokenizer writes" in note for note in notes["t5"]
    )
    assert not any("several lines" in note for note in notes["base"])
