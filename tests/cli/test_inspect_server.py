"""`lit-unlearn inspect --url`: a model behind an OpenAI-compatible server, one made here and that of transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import find_port

from lit_unlearn import LanguageModel
from lit_unlearn.cli import main
from lit_unlearn.evaluation.inspection import ask_model

KEY = "secret-77f0"
CHAT_TEMPLATE = """\
{% for message in messages %}{{ message.role }}
{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant
{% endif %}"""

# Status and body of a response.
Response = tuple[int, Any]


def say(text: str, tokens: list[tuple[str, float]] | None = None, reason: str = "stop") -> Response:
    logprobs = None
    if tokens is not None:
        logprobs = {"content": [{"token": token, "logprob": math.log(p), "top_logprobs": []} for token, p in tokens]}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": reason, "message": message, "logprobs": logprobs}
    return 200, {"id": "1", "object": "chat.completion", "choices": [choice]}


def list_models(*names: str) -> Response:
    return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


class Server:
    """Answers as `play` says, and remembers what was asked."""

    def __init__(self) -> None:
        self.play: Callable[[str, dict[str, Any]], Response] = lambda path, body: say("In Rome.")
        self.models: Response = list_models("export")
        self.requests: list[tuple[str, str, dict[str, Any]]] = []  # path, key, body
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(*server.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, self.headers["Authorization"], body))
                self._send(*server.play(self.path, body))

            def _send(self, status: int, body: Any) -> None:
                sent = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
                self.send_header("Content-Length", str(len(sent)))
                if 300 <= status < 400:
                    self.send_header("Location", "http://elsewhere.invalid/v1")
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> Iterator[Server]:
    pytest.importorskip("openai", reason='pip install -e ".[judge]" is missing')
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "LIT_UNLEARN_JUDGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    server = Server()
    yield server
    server.stop()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["inspect", *arguments])
    return capsys.readouterr().out


def test_a_served_model_beside_a_local_one(server: Server, model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32)
    answer = ask_model(lm, "Where?", max_new_tokens=4).generated
    tokens = list(zip(answer.tokens, answer.probabilities, strict=True))
    text = "".join(answer.tokens)
    server.play = lambda path, body: say(text, tokens, "length")  # type: ignore[arg-type]
    arguments = [model_dir, f"--url={server.url}", "--served_model=org/export-7B", "-q", "Where?", "--max_new_tokens=4"]
    lines = shown(capsys, *arguments).splitlines()
    host = server.url.removeprefix("http://").removesuffix("/v1")
    local = next(n for n, line in enumerate(lines) if line.startswith("  plain "))
    served = next(n for n, line in enumerate(lines) if line.startswith(f"  export-7B at {host}  says"))
    for offset in (0, 1):  # the answer, and its bars
        assert lines[served + offset].split("says")[-1].strip() == lines[local + offset].split("says")[-1].strip()
    content = json.loads(shown(capsys, *arguments, "--format=json"))
    assert content["models"] == {"plain": model_dir, f"export-7B at {host}": "org/export-7B"}
    replies = content["questions"][0]["replies"]
    assert replies[f"export-7B at {host}"]["said"]["probabilities"] == pytest.approx(answer.probabilities)
    assert replies[f"export-7B at {host}"]["said"]["probability"] == pytest.approx(answer.probability)


def test_what_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LIT_UNLEARN_JUDGE_KEY", "of-the-judge")
    monkeypatch.setenv("LIT_UNLEARN_SERVER_KEY", KEY)
    shown(capsys, f"--url={server.url}", "-q", "Where?", "--max_new_tokens=7", "--chat.system=Be short.")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where?"}]
    expected = {"model": "export", "messages": messages, "temperature": 0, "max_tokens": 7, "logprobs": True}
    assert server.requests == [("/v1/chat/completions", f"Bearer {KEY}", expected)]


def test_a_conversation_and_its_right_answer(
    server: Server, write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("user", "Hello"), ("assistant", "Hello."), ("user", "Where?"), ("assistant", "In Rome.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    lines = shown(capsys, f"--url={server.url}", "--questions", write_rows("r.jsonl", [{"messages": messages}]))
    assert [body["messages"] for _, _, body in server.requests] == [messages[:-1]]
    assert re.search(r"says ✓ +In Rome\.∎$", lines, re.MULTILINE)
    assert re.search(r"export at \S+ +100%$", lines, re.MULTILINE)  # of exact answers, and no probability
    assert "  right" not in lines


def test_a_template_is_sent_as_a_text_to_continue(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    logprobs = {"tokens": [" In", " Rome", "."], "token_logprobs": [math.log(0.5), math.log(0.25), math.log(0.5)]}
    choice = {"index": 0, "finish_reason": "stop", "text": " In Rome.", "logprobs": logprobs}
    server.play = lambda path, body: (200, {"id": "1", "object": "text_completion", "choices": [choice]})
    arguments = [f"--url={server.url}", "-q", "Where?", "--template", r"Q: {question}\nA: {answer}", "--format=json"]
    content = json.loads(shown(capsys, *arguments))
    ((path, _, body),) = server.requests
    assert (path, body["prompt"], body["logprobs"]) == ("/v1/completions", "Q: Where?\nA:", 1)
    ((reply,),) = [question["replies"].values() for question in content["questions"]]
    assert reply["said"]["text"] == "In Rome."
    # The server leaves the end token out, whose probability is not known then.
    assert reply["said"]["probabilities"] == pytest.approx([0.5, 0.25, 0.5, None])
    assert reply["said"]["probability"] is None


def test_a_server_that_refuses_logprobs_is_asked_without(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = (422, {"error": {"message": "Unexpected fields"}})
    server.play = lambda path, body: refusal if "logprobs" in body else say("In Rome.")
    out = shown(capsys, f"--url={server.url}", "-q", "Where?", "-q", "When?")
    assert ["logprobs" in body for _, _, body in server.requests] == [True, False, False]
    assert out.count("says  In Rome.∎") == 2
    assert not re.search("[▁▂▃▄▅▆▇█]", out.split("\n", 1)[1])


ERRORS: dict[str, tuple[dict[str, Any], list[str], str]] = {  # what the server does, arguments, and what is said
    "no model": (
        {"say": (404, {"error": {"message": "no such model"}})},
        ["--served_model=x"],
        "there is no model 'x'",
    ),
    "no JSON": ({"say": (200, "<html>")}, [], "gave no answer of the model 'export'.*no chat completion"),
    "half JSON": ({"say": (200, {"choices": []})}, [], "gave no answer of the model 'export'"),
    "broken": ({"say": (500, {"error": {"message": "out of memory"}})}, [], "gave no answer.*out of memory"),
    "no key": ({"say": (401, {"error": {"message": "who?"}})}, [], "refuses.*LIT_UNLEARN_SERVER_KEY"),
    "redirect": ({"say": (307, {})}, [], "redirects to http://elsewhere.invalid/v1, where nothing was sent"),
    "several": ({"list": list_models("a", "b")}, [], "lists 2 models .*'a', 'b'.*: name the one"),
    "none": ({"list": list_models()}, [], "lists 0 models"),
    "no list": ({"list": (404, {"error": "no"})}, [], "no /models"),
    "a page": ({"list": (200, "<html>")}, [], "does not list its models"),
    "template": ({}, ["--chat.args.enable_thinking=false"], "the server applies its own chat template"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_failures(case: str, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    behaviour, arguments, message = ERRORS[case]
    if "say" in behaviour:
        server.play = lambda path, body: behaviour["say"]
    server.models = behaviour.get("list", server.models)
    with pytest.raises(SystemExit):
        main(["inspect", f"--url={server.url}", "-q", "Where?", *arguments])
    assert re.fullmatch(f"lit-unlearn: error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("named", [[], ["--served_model=export"]])
def test_nothing_listens(named: list[str], server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.stop()
    started = time.monotonic()
    with pytest.raises(SystemExit):
        main(["inspect", f"--url={server.url}", "-q", "Where?", *named])
    assert f"the server at {server.url} cannot be reached" in capsys.readouterr().err
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--served_model=x"], "--url"),
        ([], "no model to ask"),
        (["--url=localhost:8000"], "`url` must start with http"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "-q", "Where?", *arguments])
    assert message in capsys.readouterr().err
    assert server.requests == []


# The server of transformers -------------------------------------------------------------------------------------------


@pytest.fixture
def export(model_dir: str, tmp_path: Path) -> str:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32)
    return str(lm.save(tmp_path / "export", chat_template=CHAT_TEMPLATE))


@pytest.fixture
def transformers_serve(export: str, tmp_path: Path) -> Iterator[str]:
    """Runs ``transformers serve`` on an export, and returns its address."""
    for name in ("openai", "fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: `transformers serve` needs pip install 'transformers[serving]'")
    port = find_port()
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", export, f"--port={port}", "--host=127.0.0.1", "--device=cpu"]
    log = tmp_path / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text("utf-8")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text("utf-8"))


@pytest.mark.neighbour
@pytest.mark.slow
@pytest.mark.parametrize("template", [None, "Q: {question}\nA: {answer}"], ids=["chat", "text"])
def test_transformers_serve_says_what_the_export_says(
    template: str | None,
    export: str,
    transformers_serve: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    arguments = [export, f"--url={transformers_serve}", f"--served_model={export}", "--max_new_tokens=8"]
    arguments += ["-q", "Where was the author born?", "-q", "Who wrote it?", "--format=json"]
    if template is not None:
        arguments += ["--template", template]
    content = json.loads(shown(capsys, *arguments))
    for question in content["questions"]:
        local, served = question["replies"].values()
        assert local["said"]["text"] == served["said"]["text"] != ""
        assert set(served["said"]["probabilities"]) == {None}  # this server gives none
