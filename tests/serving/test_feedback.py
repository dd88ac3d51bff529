"""What people think of answers becomes rows that the data step reads."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from drawn import make_adapter
from served import ASKED, KEYS, make_client, make_gateway

from carelm.data.splits import make_examples
from carelm.recipe_file import load_recipe
from carelm.serving import feedback

SAID = {"model": "base", "messages": ASKED, "answer": "Soon.", "rating": "up"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    return make_gateway(make_adapter(tmp_path_factory.mktemp("run"), *KEYS), "base")


@pytest.fixture
def rows(gateway):
    """Sends feedback, and reads what is written then."""
    client = make_client(gateway)
    file = gateway.recipe.output_dir / feedback.FILE
    file.unlink(missing_ok=True)

    def send(*bodies):
        for body in bodies:
            reply = client.post("/v1/feedback", json=body)
            assert reply.status_code == 201 and reply.json() == {"saved": str(file)}, reply.text
        return [json.loads(line) for line in file.read_text().splitlines()]

    return send


def test_a_row_is_the_conversation_with_the_answer_and_an_edit_beside_its_draft(rows):
    history = [*ASKED, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "7"}]
    plain, edited = rows(
        SAID, SAID | {"messages": history, "rating": "down", "comment": "No date", "edited": "On Monday."}
    )
    assert plain == {"category": None, "id": plain["id"], "messages": [*ASKED, {"role": "assistant", "content": "Soon."}],
                     "rating": "up", "comment": None, "model": "base"} and plain["id"] != edited["id"]  # fmt: skip
    assert edited["messages"][-1] == {"role": "assistant", "content": "On Monday."} and edited["draft"] == "Soon."
    assert edited["messages"][1]["train"] is False and edited["comment"] == "No date"


def test_what_people_say_of_an_answer_is_masked_as_what_they_ask_is(gateway):
    recipe = dataclasses.replace(gateway.recipe, mask_personal_data=True)
    mail = "write to anna@example.org"
    said = feedback.Feedback.model_validate(SAID | {"answer": mail, "edited": f"Please {mail}", "comment": f"I {mail}"})
    row = said.row(recipe, said.messages)
    assert row["messages"][-1]["content"] == "Please write to [EMAIL]" and row["comment"] == "I write to [EMAIL]"
    assert "anna" not in json.dumps(row) and row["draft"] == "write to [EMAIL]"


def test_feedback_on_a_model_that_is_not_served_is_a_404(gateway):
    reply = make_client(gateway).post("/v1/feedback", json=SAID | {"model": "../other"})
    assert reply.status_code == 404 and reply.json()["error"]["param"] == "model" and "other" not in reply.text


def test_the_data_step_trains_on_the_answers_that_were_liked_or_mended(rows, gateway):
    rows(SAID, SAID | {"rating": "down", "answer": "Never."})
    keys = {"dataset_name": gateway.recipe.output_dir / feedback.FILE, "row_filter": '{"rating": "up"}',
            "messages_column": "messages", "validation_fraction": 0, "test_fraction": 0}  # fmt: skip
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    examples, _ = make_examples(load_recipe(["--config", "recipes/demo.yaml", *words], usage=""))
    assert [e.completion[0]["content"] for e in examples["train"]] == ["Soon."]


def test_rows_written_at_once_stand_whole_each_on_its_line(tmp_path):
    texts = [f"{n} " * 5000 for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: feedback.append(tmp_path, {"text": text}), texts))
    assert sorted(json.loads(line)["text"] for line in open(tmp_path / feedback.FILE)) == sorted(texts)


def test_a_disk_that_is_full_leaves_the_rows_before(tmp_path, monkeypatch):
    feedback.append(tmp_path, {"text": "one"})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feedback.os, "fsync", full)
    with pytest.raises(OSError):
        feedback.append(tmp_path, {"text": "two"})
    assert (tmp_path / feedback.FILE).read_text() == '{"text": "one"}\n'


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("rating", {"rating": "so-so"}),
        ("answer", {"answer": ""}),
        ("messages", {"messages": []}),
        ("more", {"more": 1}),
    ],
)
def test_what_is_no_feedback_is_a_400_that_names_the_field(gateway, param, change):
    reply = make_client(gateway).post("/v1/feedback", json=SAID | change)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
