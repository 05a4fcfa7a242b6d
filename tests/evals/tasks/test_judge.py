"""A judge that answers, is slow, fails or talks nonsense: no answer and no verdict is lost."""

import dataclasses
import json
import re

import pytest

from moddistill.evals.tasks._task_utils import judge
from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks._task_utils.judge import Verdict, verdicts
from moddistill.evals.tasks.mmhal_bench.utils import RATING


@pytest.fixture
def asked(judge_server, tmp_path):
    """`asked(*prompts)`: verdicts of the judge of the environment, without pauses."""
    path = tmp_path / "out/verdicts.jsonl"

    def ask(*prompts, **changes):
        client = dataclasses.replace(judge.Judge.from_environment(), pause=0.0, **changes)
        return verdicts(client, prompts, RATING, path)

    ask.path = path
    return ask


def test_a_request_has_the_form_of_chat_completions(judge_server, asked):
    [found] = asked("Is it good?")
    assert found == Verdict("Fine.\nRating: 5, very informative, no hallucination", 5)
    [(headers, body)] = judge_server.requests
    assert headers["Authorization"] == "Bearer secret"
    message = {"role": "user", "content": "Is it good?"}
    assert body == {"model": "tiny-judge", "messages": [message], "temperature": 0}


def test_verdicts_are_stored_and_only_missing_ones_are_asked_for(judge_server, asked):
    judge_server.reply = lambda prompt: "Rating: 1" if prompt == "a" else 500
    assert asked("a", "b") == [Verdict("Rating: 1", 1), None]
    judge_server.requests.clear()
    judge_server.reply = lambda prompt: "Rating: 6"
    assert asked("b", "a") == [Verdict("Rating: 6", 6), Verdict("Rating: 1", 1)]
    assert [body["messages"][0]["content"] for _, body in judge_server.requests] == ["b"]


def test_another_model_gives_its_own_verdicts(judge_server, asked):
    asked("a")
    judge_server.reply = lambda prompt: "Rating: 0"
    assert asked("a", model="other") == [Verdict("Rating: 0", 0)]
    assert asked("a")[0].rating == 5


@pytest.mark.parametrize(
    ("reply", "requests", "reason"),
    [
        (0.6, 2, "timed out"),
        (503, 2, "HTTP Error 503"),
        (401, 1, "HTTP Error 401"),  # another try would not change that
        ("I like it.", 2, "no ratings in the reply 'I like it.'"),
        ("Rating: 2 or Rating: 3", 2, "2 ratings in the reply"),
        (b"<html>", 2, "JSONDecodeError"),
        (b'{"choices": []}', 2, r"ValueError: expected choices\[0\].message.content"),
        (b'{"choices": [{"message": {"content": null}}]}', 2, "ValueError: expected choices"),
    ],
)
def test_a_judge_that_gives_no_verdict_is_tried_again_and_counted(
    reply, requests, reason, judge_server, asked, caplog
):
    judge_server.reply = lambda prompt: reply
    limit = {"timeout": 0.3} if isinstance(reply, float) else {}
    assert asked("a", **limit) == [None]
    assert len(judge_server.requests) == requests
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("1 of 1 answers have no verdict; the same command asks again")
    assert re.search(reason, message)
    assert asked.path.read_text() == ""


def test_no_server_is_no_verdict(asked, caplog):
    assert asked("a", base_url="http://127.0.0.1:9/v1") == [None]
    assert "Connection refused" in caplog.text


def test_a_half_written_verdict_is_asked_for_again(judge_server, asked):
    asked("a", "b")
    first, second = asked.path.read_text().strip().splitlines()
    asked.path.write_text(f"{first}\n{second[:40]}")
    judge_server.requests.clear()
    assert [each.rating for each in asked("a", "b")] == [5, 5]
    assert len(judge_server.requests) == 1
    assert [each.rating for each in asked("a", "b")] == [5, 5]
    assert len(judge_server.requests) == 1
    assert json.loads(first)["judge"] == "tiny-judge"


def test_a_judge_needs_an_address_a_model_and_numbers(monkeypatch):
    assert judge.Judge.from_environment() is None
    monkeypatch.setenv("JUDGE_BASE_URL", "127.0.0.1:9")
    with pytest.raises(TaskError, match=r"^\$JUDGE_BASE_URL: expected http:// or https://, got"):
        judge.Judge.from_environment()
    monkeypatch.setenv("JUDGE_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("JUDGE_MODEL", raising=False)
    with pytest.raises(TaskError, match=r"^\$JUDGE_MODEL: expected the name of a model"):
        judge.Judge.from_environment()
    monkeypatch.setenv("JUDGE_MODEL", "m")
    monkeypatch.setenv("JUDGE_TIMEOUT", "soon")
    with pytest.raises(TaskError, match=r"^\$JUDGE_TIMEOUT: expected a number, got 'soon'"):
        judge.Judge.from_environment()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORKERS", "0", "1 to 1,000"),
        ("TRIES", "0", "1 to 100"),
        ("TIMEOUT", "nan", "more than 0 to 86,400"),
        ("TIMEOUT", "inf", "more than 0 to 86,400"),
        ("TIMEOUT", "-1", "more than 0 to 86,400"),
    ],
)
def test_numbers_of_the_judge_are_in_range(name, value, expected, judge_server, monkeypatch):
    monkeypatch.setenv(f"JUDGE_{name}", value)
    with pytest.raises(TaskError, match=rf"^\$JUDGE_{name}: expected {expected}, got '{value}'$"):
        judge.Judge.from_environment()
