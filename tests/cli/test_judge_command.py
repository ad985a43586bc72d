"""`lit-unlearn judge` against a local server: requests, scores, options."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

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


def test_means_are_of_different_rows(server: Server, results: Path) -> None:
    server.play = lambda question: say(json.dumps({**GRADES, "FLUENCY": int(question[7])}))
    assert judge(results, "--streams", "forget")["judge"]["scores"]["forget"]["FLUENCY"] == mean((0 + 1 + 2 + 3) / 4)


def test_requests(server: Server, results: Path) -> None:
    judge(results)
    assert len(server.requests) == 8
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["authorization"] == f"Bearer {KEY}"
        assert body.keys() == {"model", "messages", "temperature"}
        assert (body["model"], body["temperature"]) == ("judge-1", 0)
        (message,) = body["messages"]
        assert message["role"] == "user"
        texts = quoted(message["content"])
        stream, number = texts["question"].rstrip("?").split()
        assert texts == {"question": f"{stream} {number}?", "reference answer": f"A{number}.", "reply": f"G{number}."}
        assert all(name in message["content"] for name in scores_of(stream))


def test_variables_of_openai_are_not_used(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", f"http://foreign-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer foreign")
    monkeypatch.delenv("LIT_UNLEARN_JUDGE_KEY")
    judge(results)
    assert len(server.requests) == 8
    assert "foreign" not in str(server.requests)


def test_options_come_before_variables(server: Server, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_UNLEARN_JUDGE_URL", "http://127.0.0.1:1/v1")
    judged = judge(results, "--url", server.url, "--model", "judge-2")
    assert judged["judge"]["model"] == "judge-2"
    assert {body["model"] for *_, body in server.requests} == {"judge-2"}


@pytest.mark.parametrize("status", [200, 400, 401])
def test_the_key_is_nowhere(
    server: Server, results: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, status: int
) -> None:
    echo = fail(status, f"the key {KEY} is bad")
    server.play = lambda question: echo if status != 200 and question == "forget 1?" else say(graded(question))
    said = ""
    try:
        judge(results)
    except PermissionError as error:
        said = str(error)
    output = capsys.readouterr()
    files = [file.read_text("utf-8") for file in tmp_path.rglob("*.json")]
    everything = "".join([said, output.out, output.err, *files])
    assert ("the key [key] is bad" in everything) == (status != 200)
    assert KEY not in everything


def test_the_key_is_no_option(server: Server, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        judge(results, "--key", KEY)
    assert "--key" in capsys.readouterr().err
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
    assert all("judge" in row for name in ("forget", "retain") for row in judged["examples"][name])
    judged = judge(results, "--streams", "forget", "--limit", "1", "--model", "judge-2")
    assert judged["judge"] == {
        "model": "judge-2",
        "scores": {"forget": {name: mean(score, 1) for name, score in GRADES.items()}},
    }
    assert sum("judge" in row for rows in judged["examples"].values() for row in rows) == 1


# Requests at a time, again, and failing -----------------------------------------------------------------------------


def test_as_many_requests_at_a_time_as_workers(server: Server, tmp_path: Path) -> None:
    others = threading.Barrier(3)

    def together(question: str) -> Answer:
        if question != "forget 0?":  # which goes alone
            others.wait(timeout=10)  # breaks, and fails the test, unless two others are being answered
            time.sleep(0.05)  # one worker too many would show
        return say(graded(question))

    server.play = together
    judged = judge(write(tmp_path / "r.json", forget=10), "--workers", "3")
    assert judged["judge"]["scores"]["forget"]["FLUENCY"] == mean(7.5, 10)
    assert server.most_in_flight == 3


def test_equal_rows_are_asked_once(server: Server, results: Path) -> None:
    content = json.loads(results.read_text("utf-8"))
    content["examples"]["forget"] *= 2
    results.write_text(json.dumps(content), "utf-8")
    assert judge(results)["judge"]["scores"]["forget"]["FLUENCY"] == mean(7.5, 8)
    assert len(server.requests) == 8
