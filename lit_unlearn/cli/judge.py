"""``lit-unlearn judge``: an LLM grades the answers that an evaluation generated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from tqdm.auto import tqdm

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.evaluation.judge import RequestFailed, judge, judge_table
from lit_unlearn.utils.io import read_json, write_json

TIMEOUT = 120.0  # seconds for one attempt
RETRIES = 6  # of a request: about 20 seconds of waiting, unless the endpoint names a delay
_URL, _MODEL, _KEY = (f"LIT_UNLEARN_JUDGE_{name}" for name in ("URL", "MODEL", "KEY"))
_NOT_OURS = ("OpenAI-Organization", "OpenAI-Project")  # headers from OPENAI_* variables, meant for another endpoint


def run(arguments: list[str]) -> None:
    """Has an LLM grade the generated answers in a results file, adds the grades to it and prints their means.

    Args:
        arguments: After the command's name. The key of the endpoint is none of them: it would show in process lists.
    """
    text = "Has an LLM grade the generated answers in a results file, adds the grades to it and prints their means. The key "
    text += f"of the endpoint, where it wants one, is read from {_KEY}."
    parser = CommandParser(prog="lit-unlearn judge", description=text)
    parser.add_argument("results", type=str, help="JSON file with examples that have generated answers.")
    parser.add_argument("--streams", type=str, nargs="+", help="Streams to judge; all by default.")
    parser.add_argument("--url", type=str, help=f"What precedes /chat/completions, such as …/v1; or {_URL}.")
    parser.add_argument("--model", type=str, help=f"The endpoint's name of the judge; or {_MODEL}.")
    parser.add_argument("--workers", type=PositiveInt, default=8, help="Requests at a time.")
    parser.add_argument("--limit", type=PositiveInt, help="Judge the first so many rows of a stream.")
    parser.add_argument("--cache", type=str, help="Folder of replies; $LIT_UNLEARN_CACHE/judge by default.")
    settings = parser.parse_args(arguments)
    file = Path(settings.results)
    results = _read(file)
    url, model = _setting("--url", settings.url, _URL), _setting("--model", settings.model, _MODEL)
    endpoint = Endpoint(url, model, os.environ.get(_KEY, "").strip())
    replies = Replies(model, Path(settings.cache) if settings.cache else None)
    judge(results, lambda p: ask(p, endpoint, replies, settings.workers), model, settings.streams, settings.limit)
    write_json(file, results)
    print(judge_table(results))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no results file '{file}'.")
    try:
        results = read_json(file)
    except ValueError as error:
        raise ValueError(f"'{file}' is no JSON file: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("examples"), dict):
        raise ValueError(f"'{file}' is no results file: it has no 'examples' by stream.")
    return results


def _setting(option: str, given: str | None, variable: str) -> str:
    if value := given or os.environ.get(variable):
        return value
    raise ValueError(f"the judge is not known: give {option} or set {variable}.")


class Replies:
    """Replies on disk, one file each, by model and prompt: who asks again, or after an interruption, pays for none twice.

    Args:
        model: The judge's name.
        folder: Of the files; ``None`` for ``$LIT_UNLEARN_CACHE/judge``, or else ``~/.cache/lit_unlearn/judge``.
    """

    def __init__(self, model: str, folder: Path | None = None) -> None:
        home = os.environ.get("LIT_UNLEARN_CACHE") or Path.home() / ".cache" / "lit_unlearn"
        self.model, self.folder = model, Path(home) / "judge" if folder is None else folder

    def get(self, prompt: str) -> str | None:
        """The reply to a prompt, if there has been one."""
        try:
            return str(read_json(self._file(prompt))["reply"])
        except (FileNotFoundError, ValueError):  # none yet, or cut short by a crash of the machine
            return None

    def put(self, prompt: str, reply: str) -> None:
        """Keeps a reply."""
        write_json(self._file(prompt), {"model": self.model, "prompt": prompt, "reply": reply})

    def _file(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()}.json"


class Endpoint:
    """A judge behind an OpenAI-compatible address.

    Args:
        url: What precedes ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: Name by which the endpoint knows the judge.
        key: Bearer token; empty where none is asked for.

    Raises:
        ValueError: If ``url`` is no address.
        RuntimeError: If the ``openai`` package is missing.
    """

    def __init__(self, url: str, model: str, key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's address must start with http:// or https://, unlike '{url}'.")
        try:
            from openai import OpenAI, Timeout
        except ImportError:
            raise RuntimeError('the judge needs the openai package: pip install "lit-unlearn[judge]"') from None
        self.url, self.model, self._key = url, model, key or "no-key"
        self._client = OpenAI(base_url=url, api_key=self._key, timeout=Timeout(TIMEOUT, connect=min(TIMEOUT, 10.0)))

    def complete(self, prompt: str, retries: int) -> str:
        """The judge's reply at temperature 0.

        Args:
            prompt: The user's message.
            retries: After 429, 5xx, timeouts and lost connections, with growing delays.

        Raises:
            RequestFailed: If this request failed.
            OSError: If every other would fail too, because the key is refused or nothing listens.
            LookupError: Likewise, because there is no such address or model.
        """
        from openai import OpenAIError, omit

        try:
            completion = self._client.with_options(max_retries=retries).chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                extra_headers={"Authorization": f"Bearer {self._key}", **dict.fromkeys(_NOT_OURS, omit)},
            )
        except (OpenAIError, json.JSONDecodeError) as error:
            raise self._explain(error) from None  # the chain would show the endpoint's words, which may hold the key
        return _text(completion)

    def _explain(self, error: Exception) -> Exception:
        status, code, cause = getattr(error, "status_code", 0), getattr(error, "code", None), error.__cause__
        reason = " ".join(f"{error}{f' {cause}' if cause else ''}".replace(self._key, "[key]").split())[:300]
        if status in (401, 402, 403) or code == "insufficient_quota":
            return PermissionError(f"the judge at {self.url} refuses ({reason}): set {_KEY} to a key that may use it.")
        if status == 404:
            return LookupError(f"at {self.url} there is no model '{self.model}' or no /chat/completions ({reason}).")
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):  # of httpx or httpx2, as openai's version has it
            return ConnectionError(f"the judge at {self.url} cannot be reached ({reason}): does it run there?")
        return RequestFailed(reason)


def _text(completion: Any) -> str:
    try:
        choice = completion.choices[0]
        text, reason = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):  # openai checks no shapes
        raise RequestFailed("the endpoint's answer is no chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise RequestFailed(f"the judge said nothing (finish reason: {reason})")
    return text


def ask(prompts: Sequence[str], endpoint: Endpoint, kept: Replies, workers: int) -> dict[str, str | RequestFailed]:
    """The reply to every prompt, from the endpoint where it is not kept.

    Args:
        prompts: Equal ones are asked once.
        endpoint: The judge.
        kept: Where replies are looked for, and put as soon as they come.
        workers: Requests at a time.
    """
    replies: dict[str, str | RequestFailed] = {p: r for p in dict.fromkeys(prompts) if (r := kept.get(p)) is not None}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in replies]

    def answer(prompt: str, retries: int) -> str | RequestFailed:
        try:
            reply = endpoint.complete(prompt, retries)
        except RequestFailed as failure:
            return failure
        kept.put(prompt, reply)
        return reply

    if missing and isinstance(first := answer(missing[0], 0), str):  # alone: a wrong key or address ends here, at once
        replies[missing.pop(0)] = first
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(answer, prompt, RETRIES): prompt for prompt in missing}
        for future in tqdm(as_completed(futures), total=len(futures), desc="judge", unit="reply", leave=False):
            replies[futures[future]] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what waits in the queue would still be asked
    return replies
