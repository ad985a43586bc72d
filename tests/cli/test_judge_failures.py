"""`lit-unlearn judge` when requests fail, replies cannot be read, or it is stopped."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_judge import GRADES, KEPT, Answer, Server, cells, fail, graded, judge, mean, results, say, server, write

from lit_unlearn import cli
from lit_unlearn.cli import _is_ours
from lit_unlearn.cli import judge as command


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(server: Server, results: Path, status: int) -> None:
    server.play = lambda question: fail(status) if server.asked[question] < 4 else say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["retain"]["ACCURACY"] == mean(6)
    assert set(server.asked.values()) == {4}


def test_delays_grow(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.04)
    times: list[float] = []

    def play(question: str) -> Answer:
        if question == "forget 3?":
            times.append(time.monotonic())
            if len(times) < 5:
                return 500, {}, {}
        return say(graded(question))

    server.play = play
    judge(results)
    waits = [after - before for before, after in pairwise(times)]
    # 0.04 · 2^n less up to a quarter; a slow machine only adds to it
    assert [wait >= 0.75 * 0.04 * 2**n for n, wait in enumerate(waits)] == [True] * 4


def test_a_request_that_keeps_failing_costs_its_own_row_alone(
    server: Server, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda question: fail(400, "too long") if question == "forget 2?" else say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["forget"] == {name: mean(score, 3, 1) for name, score in GRADES.items()}
    row = judged["examples"]["forget"][2]
    assert row["judge"] == {}
    assert row["judge_error"] == "Error code: 400 - too long"
    assert "1 of the rows: Error code: 400 - too long" in capsys.readouterr().out
    assert server.asked["forget 2?"] == 1  # nothing that may pass
    server.play = lambda question: say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["forget"] == {name: mean(score) for name, score in GRADES.items()}
    assert "judge_error" not in judged["examples"]["forget"][2]
    assert len(server.requests) == 9


def drop(_: threading.Event) -> None:
    raise ConnectionResetError  # the connection is closed without an answer


def hang(end: threading.Event) -> None:
    end.wait(timeout=30)


@pytest.mark.parametrize(("happens", "reason"), [(hang, "timed out"), (drop, "disconnected")])
def test_no_answer_costs_its_own_row_alone(
    server: Server,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[threading.Event], None],
    reason: str,
) -> None:
    monkeypatch.setattr(command, "TIMEOUT", 0.5)
    monkeypatch.setattr(command, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    end = threading.Event()

    def play(question: str) -> Answer:
        if question == "retain 1?":
            happens(end)
        return say(graded(question))

    server.play = play
    judged = judge(results)
    end.set()
    assert judged["judge"]["scores"]["retain"]["FLUENCY"] == mean(9, 3, 1)
    assert reason in judged["examples"]["retain"][1]["judge_error"]
    assert server.asked["retain 1?"] == 2


NO_COMPLETION = "the endpoint's answer is no chat completion"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (say(None), "the judge said nothing (finish reason: stop)"),
        (say(" \n"), "the judge said nothing (finish reason: stop)"),
        ((200, {}, {"error": {"message": "overloaded"}}), NO_COMPLETION),
        ((200, {}, {"choices": []}), NO_COMPLETION),
        ((200, {}, {"choices": ["x"]}), NO_COMPLETION),
        ((200, {}, [1]), NO_COMPLETION),
        ((200, {"Content-Type": "text/html"}, "<html>"), NO_COMPLETION),
        ((200, {}, "{"), "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_no_completion_is_a_failed_request(server: Server, results: Path, answer: Answer, reason: str) -> None:
    server.play = lambda question: answer if question == "forget 1?" else say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["forget"]["FLUENCY"] == mean(7.5, 3, 1)
    assert judged["examples"]["forget"][1]["judge_error"] == reason


def test_unreadable_grades_are_counted_and_in_no_mean(
    server: Server, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        "forget 0?": '{"KNOWLEDGE_REMOVAL": 4, "VERBATIM_REMOVAL": 6, "FLUENCY": 11}',
        "forget 1?": "I would rather not.",
        "forget 2?": '{"KNOWLEDGE_REMOVAL": "high", "VERBATIM_REMOVAL": 8}',
        "forget 3?": "KNOWLEDGE_REMOVAL: 0\nVERBATIM_REMOVAL: 1\nFLUENCY: none",
    }
    server.play = lambda question: say(said[question])
    judged = judge(results, "--streams", "forget")
    assert judged["judge"]["scores"]["forget"] == {
        "KNOWLEDGE_REMOVAL": mean((4 + 0) / 2, 2, 2),
        "VERBATIM_REMOVAL": mean((6 + 8 + 1) / 3, 3, 1),
        "FLUENCY": {"mean": None, "count": 0, "failed": 4},
    }
    rows = judged["examples"]["forget"]
    assert rows[1]["judge"] == {}
    assert rows[2]["judge"] == {"VERBATIM_REMOVAL": 8}
    assert rows[2]["judge_error"] == "no number from 0 to 10 for KNOWLEDGE_REMOVAL, FLUENCY"
    assert ["forget/FLUENCY", "–", "0", "4"] in [cells(line) for line in capsys.readouterr().out.splitlines()]


# The cache and interruptions ----------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_and_writes_the_same(
    server: Server, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda question: say("no grades" if question == "forget 1?" else graded(question))
    judge(results)
    first, table = results.read_bytes(), capsys.readouterr().out
    server.stop()
    judge(results)
    assert results.read_bytes() == first
    assert capsys.readouterr().out == table
    assert len(server.requests) == 8


def test_a_cache_serves_one_model_and_lies_where_it_is_told(server: Server, results: Path, tmp_path: Path) -> None:
    judge(results)
    assert len(list((tmp_path / "cache" / "judge").iterdir())) == 8
    judge(results, "--model", "judge-2")
    judge(results, "--cache", str(tmp_path / "elsewhere"))
    assert len(server.requests) == 24
    assert len(list((tmp_path / "elsewhere").iterdir())) == 8


def test_the_default_cache_is_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIT_UNLEARN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.Replies("m").folder == tmp_path / ".cache" / "lit_unlearn" / "judge"


def test_a_reply_cut_short_on_disk_is_asked_again(server: Server, results: Path, tmp_path: Path) -> None:
    judge(results)
    first = results.read_bytes()
    next((tmp_path / "cache" / "judge").iterdir()).write_text('{"repl', "utf-8")
    judge(results)
    assert results.read_bytes() == first
    assert len(server.requests) == 9


def test_an_interrupted_run_goes_on(
    server: Server, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    before = results.read_bytes()

    def play(question: str) -> Answer:
        if len(server.requests) == 4:
            server.stop()  # answers this one, and takes no further connection
        return say(graded(question))

    server.play = play
    with pytest.raises(ConnectionError, match=re.escape(f"the judge at {server.url} cannot be reached")) as info:
        judge(results, "--workers", "1")
    assert _is_ours(info.value)
    assert results.read_bytes() == before
    assert len(list((tmp_path / "cache" / "judge").iterdir())) == 4
    again = Server()
    judged = judge(results, "--url", again.url)
    again.stop()
    assert not set(again.asked) & set(server.asked)
    assert len(again.requests) == 4
    assert judged["judge"]["scores"]["retain"] == {name: mean(score) for name, score in KEPT.items()}


# Errors that stop at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (fail(401, "bad key"), PermissionError, r"refuses \(Error code: 401 - bad key\): set LIT_UNLEARN_JUDGE_KEY to"),
        (fail(402, "no credit"), PermissionError, "refuses .*402"),
        (fail(403, "not yours"), PermissionError, "refuses .*403"),
        (fail(429, "pay", code="insufficient_quota"), PermissionError, "refuses .*429"),
        (fail(404, "what?"), LookupError, "there is no model 'judge-1' or no /chat/completions"),
    ],
)
@pytest.mark.parametrize("good", [0, 3])
def test_a_refusal_stops_at_once(
    server: Server, tmp_path: Path, answer: Answer, kind: type[Exception], message: str, good: int
) -> None:
    results = write(tmp_path / "r.json", forget=40)
    before = results.read_bytes()
    server.play = lambda question: say(graded(question)) if len(server.requests) <= good else answer
    with pytest.raises(kind, match=message) as info:
        judge(results, "--workers", "1")
    assert _is_ours(info.value)
    assert results.read_bytes() == before
    assert len(server.asked) < 40 if good else len(server.asked) == 1  # a worker may be ahead of who reads its replies


def test_an_unreachable_endpoint_stops_at_once(server: Server, results: Path) -> None:
    before, start = results.read_bytes(), time.monotonic()
    server.stop()
    with pytest.raises(ConnectionError, match=r"cannot be reached .*refused.*: does it run there") as info:
        judge(results)
    assert time.monotonic() - start < 5  # without any retry
    assert _is_ours(info.value)
    assert results.read_bytes() == before


def test_a_full_disk_changes_nothing(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(results)
    before = results.read_bytes()

    def dump(_: Any, file: Any, **__: Any) -> None:
        file.write('{"suite"')
        raise OSError("no space left")

    monkeypatch.setattr("json.dump", dump)
    with pytest.raises(OSError, match="no space left"):
        judge(results, "--streams", "forget", "--limit", "1")
    assert results.read_bytes() == before
    assert not list(results.parent.glob("*.tmp"))


def test_no_success_at_all_changes_nothing(server: Server, results: Path) -> None:
    before = results.read_bytes()
    server.play = lambda _: fail(400, "temperature is not supported")
    with pytest.raises(
        RuntimeError, match=r"no request to the judge 'judge-1' succeeded: .* temperature is not"
    ) as info:
        judge(results)
    assert _is_ours(info.value)
    assert results.read_bytes() == before


def test_without_openai(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RuntimeError, match=re.escape('pip install "lit-unlearn[judge]"')) as info:
        judge(results)
    assert _is_ours(info.value)


@pytest.mark.parametrize("name", ["URL", "MODEL"])
def test_a_judge_must_be_named(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"LIT_UNLEARN_JUDGE_{name}", "")
    with pytest.raises(ValueError, match=f"give --{name.lower()} or set LIT_UNLEARN_JUDGE_{name}"):
        judge(results)


ROW = {"question": "q", "answer": "a", "generated": "g"}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", [], "is no JSON file"),
        ("[]", [], "it has no 'examples'"),
        ({"examples": []}, [], "it has no 'examples'"),
        ({"examples": {"forget": [{"question": "q"}]}}, [], r"no rows with 'generated' anywhere; .*: \[\]"),
        ({"examples": {"a": [ROW]}}, ["--streams", "b"], r"no rows with 'generated' in \['b'\]; .*: \['a'\]"),
        ({"examples": {"a": [{"generated": ""}]}}, [], r"rows of the 'a' stream lack a text under \['answer', 'ques"),
        ({"examples": {"a": [ROW]}}, ["--url", "localhost:8000"], "must start with http"),
    ],
)
def test_wrong_input(server: Server, tmp_path: Path, content: Any, options: list[str], message: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message) as info:
        judge(file, *options)
    assert _is_ours(info.value)
    assert file.read_bytes() == before
    assert not server.requests


def test_no_results_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no results file") as info:
        judge(tmp_path / "none.json")
    assert _is_ours(info.value)


def test_from_the_command_line(server: Server, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["judge", str(results), "--streams", "forget", "retain", "--workers", "2"])
    assert "retain/FLUENCY" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=re.escape("lit-unlearn: error: no rows with 'generated' in ['b']")):
        cli.main(["judge", str(results), "--streams=b"])
