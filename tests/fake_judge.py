"""A local server that plays an OpenAI-compatible endpoint, and a results file to judge."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lit_unlearn.cli import judge as command

KEY = "secret-5e0c1"
GRADES = {"KNOWLEDGE_REMOVAL": 9, "VERBATIM_REMOVAL": 10, "FLUENCY": 7.5}
KEPT = {"RETENTION_SCORE": 8, "ACCURACY": 6, "RELEVANCE": 10, "FLUENCY": 9}
Answer = tuple[int, dict[str, str], Any]  # status, headers, body


def say(text: str | None) -> Answer:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return 200, {}, {"id": "1", "object": "chat.completion", "choices": [choice]}


def fail(status: int, message: str = "no", **error: Any) -> Answer:
    return status, {"retry-after-ms": "1"}, {"error": {"message": message, **error}}


def graded(question: str) -> str:
    """What a good judge answers about ``forget 3?`` and ``retain 3?``."""
    return json.dumps(GRADES if question.startswith("forget") else KEPT)


class Listener(ThreadingHTTPServer):
    request_queue_size = 64  # more connections at a time than that wait for a second


class Server:
    """Answers every question as `play` says, and remembers what was asked."""

    def __init__(self) -> None:
        self.play: Callable[[str], Answer] = lambda question: say(graded(question))
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.asked: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._http = Listener(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        question = quoted(body["messages"][0]["content"])["question"]
        with self._lock:
            self.requests.append((path, headers, body))
            self.asked[question] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self.play(question)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, extra, content = server.answer(self.path, headers, body)
                if isinstance(content, str):
                    content = content.encode()
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(sent)),
                    **extra,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

            def handle(self) -> None:
                try:
                    super().handle()
                except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def quoted(prompt: str) -> dict[str, str]:
    """The texts that a prompt quotes as JSON."""
    texts: dict[str, str] = json.JSONDecoder().raw_decode(prompt, prompt.index("{"))[0]
    return texts


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "LIT_UNLEARN_JUDGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LIT_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LIT_UNLEARN_JUDGE_KEY", KEY)
    monkeypatch.setenv("LIT_UNLEARN_JUDGE_MODEL", "judge-1")
    server = Server()
    monkeypatch.setenv("LIT_UNLEARN_JUDGE_URL", server.url)
    yield server
    server.stop()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four forget and four retain rows, and a holdout stream without generated answers."""
    return write(tmp_path / "results.json", forget=4, retain=4)


def write(file: Path, **rows: int) -> Path:
    examples: dict[str, list[dict[str, Any]]] = {
        name: [
            {"question": f"{name} {n}?", "answer": f"A{n}.", "generated": f"G{n}.", "nll": 0.5} for n in range(count)
        ]
        for name, count in rows.items()
    }
    examples["holdout"] = [{"question": "h?", "answer": "H."}]
    file.write_text(json.dumps({"suite": "tofu", "aggregate": {"model_utility": 0.6}, "examples": examples}), "utf-8")
    return file


def judge(file: Path, *options: str) -> dict[str, Any]:
    command.run([str(file), *options])
    judged: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return judged


def mean(score: float, count: int = 4, failed: int = 0) -> dict[str, float | None]:
    return {"mean": score, "count": count, "failed": failed}


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())
