"""`lit-unlearn judge` against a local server: requests, scores, failures, the cache. Retries are openai's, and tested there."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_judge import (
    GRADES,
    KEPT,
    KEY,
    Answer,
    Server,
    cells,
    fail,
    graded,
    judge,
    mean,
    quoted,
    results,
    say,
    server,
    write,
)

from lit_unlearn import cli
from lit_unlearn.errors import ConfigError, DataError, EndpointError, LitUnlearnError, MissingFileError
from lit_unlearn.evaluation import judge_client
from lit_unlearn.evaluation.judge import scores_of

# What is written and sent --------------------------------------------------------------------------------------------


def test_scores_of_every_row_and_stream(server: Server, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(results.read_text("utf-8"))
    judged = judge(results)
    assert judged.pop("judge") == {
        "model": "judge-1",
        "scores": {
            "forget": {name: mean(score) for name, score in GRADES.items()},
            "retain": {name: mean(score) for name, score in KEPT.items()},
        },
    }
    for name, scores in {"forget": GRADES, "retain": KEPT}.items():
        assert [row.pop("judge") for row in judged["examples"][name]] == [scores] * 4
    assert judged == before  # and nothing else has changed
    assert [cells(line) for line in capsys.readouterr().out.splitlines()[:3:2]] == [
        ["judge judge-1", "mean", "count", "failed"],
        ["forget/KNOWLEDGE_REMOVAL", "9.00", "4", "0"],
    ]


def test_requests(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "BASE_URL"):  # meant for another endpoint
        monkeypatch.setenv(f"OPENAI_{name}", f"http://foreign-{name}")
    judge(results)
    assert len(server.requests) == 8
    assert "foreign" not in str(server.requests)
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["authorization"] == f"Bearer {KEY}"
        assert body.keys() == {"model", "messages", "temperature"}
        assert (body["model"], body["temperature"]) == ("judge-1", 0)
        (message,) = body["messages"]
        texts = quoted(message["content"])
        stream, number = texts["question"].rstrip("?").split()
        assert texts == {"question": f"{stream} {number}?", "reference answer": f"A{number}.", "reply": f"G{number}."}
        assert all(name in message["content"] for name in scores_of(stream))


@pytest.mark.parametrize("status", [200, 400, 401])
def test_the_key_is_nowhere(
    server: Server, results: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, status: int
) -> None:
    echo = fail(status, f"the key {KEY} is bad")
    server.play = lambda question: echo if status != 200 and question == "forget 1?" else say(graded(question))
    message = ""
    try:
        judge(results)
    except EndpointError as error:
        message = str(error)
    output = capsys.readouterr()
    files = [file.read_text("utf-8") for file in tmp_path.rglob("*.json")]
    everything = "".join([message, output.out, output.err, *files])
    assert ("the key [key] is bad" in everything) == (status != 200)
    assert KEY not in everything


def test_the_key_is_no_option(server: Server, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--key"):
        judge(results, "--key", KEY)
    with pytest.raises(SystemExit):
        judge(results, "--help")
    shown = capsys.readouterr().out
    assert "LIT_UNLEARN_JUDGE_KEY" in shown
    assert "--key" not in shown


def test_streams_and_limit(server: Server, results: Path) -> None:
    judged = judge(results, "--streams", "forget", "--limit", "3")
    assert judged["judge"]["scores"] == {"forget": {name: mean(score, 3) for name, score in GRADES.items()}}
    assert ["judge" in row for row in judged["examples"]["forget"]] == [True, True, True, False]
    assert sorted(server.asked) == ["forget 0?", "forget 1?", "forget 2?"]


def test_other_streams_keep_the_scores_of_the_same_judge_only(server: Server, results: Path) -> None:
    judge(results, "--streams", "retain")
    judged = judge(results, "--streams", "forget")
    assert judged["judge"]["scores"].keys() == {"retain", "forget"}
    judged = judge(results, "--streams", "forget", "--limit", "1", "--model", "judge-2")
    scores = {name: mean(score, 1) for name, score in GRADES.items()}
    assert judged["judge"] == {"model": "judge-2", "scores": {"forget": scores}}
    assert sum("judge" in row for rows in judged["examples"].values() for row in rows) == 1


def test_as_many_requests_at_a_time_as_workers(server: Server, tmp_path: Path) -> None:
    barrier = threading.Barrier(3)

    def answer_together(question: str) -> Answer:
        if question != "forget 0?":  # which goes alone
            barrier.wait(timeout=10)  # breaks, and fails the test, unless two more are being answered
            time.sleep(0.05)  # one worker too many would show
        return say(graded(question))

    server.play = answer_together
    judge(write(tmp_path / "r.json", forget=10), "--workers", "3")
    assert server.most_in_flight == 3


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_failing_request_costs_its_own_row_alone(
    server: Server, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda question: fail(400, "too long") if question == "forget 2?" else say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["forget"] == {name: mean(score, 3, 1) for name, score in GRADES.items()}
    row = judged["examples"]["forget"][2]
    assert row["judge"] == {}
    assert row["judge_error"] == "Error code: 400 - too long"
    assert "1 of the rows: Error code: 400 - too long" in capsys.readouterr().out
    server.play = lambda question: say(graded(question))
    judged = judge(results)  # again, without what the cache has
    assert judged["judge"]["scores"]["forget"] == {name: mean(score) for name, score in GRADES.items()}
    assert "judge_error" not in judged["examples"]["forget"][2]
    assert len(server.requests) == 9


NO_COMPLETION = "no chat completion"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (say(" \n"), "empty (finish reason: stop)"),
        ((200, {}, {"error": {"message": "overloaded"}}), NO_COMPLETION),
        ((200, {}, {"choices": ["x"]}), NO_COMPLETION),
        ((200, {"Content-Type": "text/html"}, "<html>"), NO_COMPLETION),
        ((200, {}, "{"), "line 1 column 2"),
    ],
)
def test_no_completion_is_a_failed_request(server: Server, results: Path, answer: Answer, reason: str) -> None:
    server.play = lambda question: answer if question == "forget 1?" else say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["forget"]["FLUENCY"] == mean(7.5, 3, 1)
    assert reason in judged["examples"]["forget"][1]["judge_error"]


def test_unreadable_grades_are_counted_and_in_no_mean(server: Server, results: Path) -> None:
    replies = {
        "forget 0?": '{"KNOWLEDGE_REMOVAL": 4, "VERBATIM_REMOVAL": 6, "FLUENCY": 11}',
        "forget 1?": "I would rather not.",
        "forget 2?": '{"KNOWLEDGE_REMOVAL": "high", "VERBATIM_REMOVAL": 8}',
        "forget 3?": "KNOWLEDGE_REMOVAL: 0\nVERBATIM_REMOVAL: 1\nFLUENCY: none",
    }
    server.play = lambda question: say(replies[question])
    judged = judge(results, "--streams", "forget")
    assert judged["judge"]["scores"]["forget"] == {
        "KNOWLEDGE_REMOVAL": mean((4 + 0) / 2, 2, 2),
        "VERBATIM_REMOVAL": mean((6 + 8 + 1) / 3, 3, 1),
        "FLUENCY": {"mean": None, "count": 0, "failed": 4},
    }
    assert "KNOWLEDGE_REMOVAL, FLUENCY" in judged["examples"]["forget"][2]["judge_error"]


@pytest.mark.parametrize("code", [401, 402, 403, 404])
@pytest.mark.parametrize("good", [0, 3])
def test_a_refusal_stops_at_once(server: Server, tmp_path: Path, code: int, good: int) -> None:
    results = write(tmp_path / "r.json", forget=40)
    before = results.read_bytes()
    server.play = lambda question: say(graded(question)) if len(server.requests) <= good else fail(code)
    with pytest.raises(EndpointError, match=f"{re.escape(server.url)}.*{code}"):
        judge(results, "--workers", "1")
    assert results.read_bytes() == before
    assert len(server.asked) < 40 if good else len(server.asked) == 1  # a worker may be ahead of who reads its replies


def test_an_interrupted_run_continues_from_the_cache(
    server: Server, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_client, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    before = results.read_bytes()

    def play(question: str) -> Answer:
        if len(server.requests) == 4:
            server.stop()  # answers this one, and takes no further connection
        return say(graded(question))

    server.play = play
    with pytest.raises(EndpointError, match=f"{re.escape(server.url)} cannot be reached"):
        judge(results, "--workers", "1")
    assert results.read_bytes() == before
    (tmp_path / "cache" / "judge" / "damaged.json").write_text('{"repl', "utf-8")
    again = Server()
    judged = judge(results, "--url", again.url)
    again.stop()
    assert not set(again.asked) & set(server.asked)
    assert len(again.requests) == 4
    assert judged["judge"]["scores"]["retain"] == {name: mean(score) for name, score in KEPT.items()}


def test_an_unreachable_endpoint_stops_at_once(server: Server, results: Path) -> None:
    start = time.monotonic()
    server.stop()
    with pytest.raises(EndpointError, match="cannot be reached"):
        judge(results)
    assert time.monotonic() - start < 5  # without any retry


def test_no_success_at_all_changes_nothing(server: Server, results: Path) -> None:
    before = results.read_bytes()
    server.play = lambda _: fail(400, "temperature is not supported")
    with pytest.raises(EndpointError, match=r"'judge-1'.* temperature is not"):
        judge(results)
    assert results.read_bytes() == before


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_cache_serves_one_model_and_is_where_it_is_told(server: Server, results: Path, tmp_path: Path) -> None:
    judge(results)
    first = results.read_bytes()
    judge(results)
    assert results.read_bytes() == first
    assert len(server.requests) == len(list((tmp_path / "cache" / "judge").iterdir())) == 8
    judge(results, "--model", "judge-2")
    judge(results, "--cache", str(tmp_path / "elsewhere"))
    assert len(server.requests) == 24
    assert len(list((tmp_path / "elsewhere").iterdir())) == 8


def test_the_default_cache_is_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIT_UNLEARN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert judge_client.ReplyCache("m").folder == tmp_path / ".cache" / "lit_unlearn" / "judge"


# Wrong input ----------------------------------------------------------------------------------------------------------

ROW = {"question": "q", "answer": "a", "generated": "g"}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", [], "r.json"),
        ("[]", [], "examples"),
        ({"examples": {"forget": [{"question": "q"}]}}, [], "'generated'"),
        ({"examples": {"a": [ROW]}}, ["--streams", "b"], r"\['b'\].* \['a'\]"),
        ({"examples": {"a": [{"generated": ""}]}}, [], r"'a'.*\['answer', 'question'\]"),
        ({"examples": {"a": [ROW]}}, ["--url", "localhost:8000"], "localhost:8000"),
    ],
)
def test_wrong_input(server: Server, tmp_path: Path, content: Any, options: list[str], message: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        judge(file, *options)
    assert file.read_bytes() == before
    assert not server.requests


@pytest.mark.parametrize("name", ["URL", "MODEL"])
def test_a_judge_must_be_named(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"LIT_UNLEARN_JUDGE_{name}", "")
    with pytest.raises(ConfigError, match=f"--{name.lower()} or set LIT_UNLEARN_JUDGE_{name}"):
        judge(results)


def test_without_openai_or_a_file(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"none\.json"):
        judge(results.with_name("none.json"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(LitUnlearnError, match=re.escape("lit-unlearn[judge]")):
        judge(results)


def test_from_the_command_line(server: Server, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["judge", str(results), "--streams", "forget", "retain", "--workers", "2"])
    assert "retain/FLUENCY" in capsys.readouterr().out
    results.write_text("{}")
    with pytest.raises(SystemExit, match=r"lit-unlearn: error: .*examples") as end:
        cli.main(["judge", str(results)])
    assert end.value.code == DataError.exit_code
