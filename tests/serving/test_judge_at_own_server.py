"""A judge may be a model that this project serves: asked over HTTP as any other, stopped and gone on with."""

import pytest
from served import KEYS, listening, make_gateway

from carelm.errors import UserError
from carelm.evaluation.judge import PROMPTS, Judged, find_judge
from carelm.recipe_file import load_recipe

TURNS = [{"role": "user", "content": "Where is my order?"}]
ASKED = [Judged(TURNS, ("It comes today.",)), Judged(TURNS, ("It comes today.", "No idea."))]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    keys = ["--max_length", "1000", "--load_in_4bit", "false", "--output_dir", str(tmp_path_factory.mktemp("run"))]
    return make_gateway(load_recipe(keys, usage=""), "base")


def judge_at(port):
    keys = ["--judge", "base", "--judge_url", f"http://127.0.0.1:{port}/v1", "--judge_max_tokens", "8"]
    return find_judge(load_recipe(keys, usage=""))


def test_a_served_model_judges_and_what_it_says_is_counted_by_the_server_and_read_strictly(
    gateway, tmp_path, monkeypatch
):
    monkeypatch.setenv("JUDGE_API_KEY", "key-of-the-server")
    with listening(gateway, "key-of-the-server") as port:
        judge = judge_at(port)
        judge.check_is_there()
        marks, preference = judge.judge(ASKED, tmp_path)
        monkeypatch.setenv("JUDGE_API_KEY", "another")
        with pytest.raises(UserError, match=r"answers 401 \(the key is read from JUDGE_API_KEY\)"):
            judge.check_is_there()
    # The tiny base speaks of a shop's orders, so that nothing it says is a judgement.
    assert marks.found == preference.found == {} and len(preference.unread) == 2 and marks.problem and marks.reply
    chat = gateway.speakers["base"].chat
    for line in judge.lines.values():
        told = PROMPTS["pair" if "<<<answer 1" in line["asked"] else "score"]
        messages = [{"role": "system", "content": told}, {"role": "user", "content": line["asked"]}]
        assert line["prompt_tokens"] == len(chat.prompt_ids(messages)) and 0 < line["new_tokens"] <= 8
    again = judge_at(port)  # the server is gone, and all is there
    assert again.judge(ASKED, tmp_path) == [marks, preference]


def test_a_server_that_goes_away_between_is_one_line_and_the_same_call_goes_on(gateway, tmp_path):
    with listening(gateway) as port:
        judge_at(port).judge(ASKED[:1], tmp_path)
    with pytest.raises(UserError, match="cannot be reached .*; 1 of 3 judgements are kept"):
        judge_at(port).judge(ASKED, tmp_path)


def test_a_window_that_is_too_small_for_the_judges_prompt_is_one_line(tmp_path):
    small = make_gateway(load_recipe([*KEYS, "--output_dir", str(tmp_path)], usage=""), "base")
    with listening(small) as port, pytest.raises(UserError, match="answers 400: messages: .* window"):
        judge_at(port).judge(ASKED, tmp_path)
