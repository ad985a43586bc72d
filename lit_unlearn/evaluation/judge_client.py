"""Ask an LLM judge behind an OpenAI-compatible endpoint, and keep its replies on disk.

Retries after 429, 5xx, timeouts and lost connections are the ``openai`` client's own, with growing delays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lit_unlearn.errors import ConfigError, EndpointError
from lit_unlearn.evaluation.judge import RequestFailed
from lit_unlearn.utils.io import cache_folder, expand_path, read_json, write_json
from lit_unlearn.utils.redaction import redact_secrets

TIMEOUT = 120.0  # seconds for one attempt
RETRIES = 6  # of a request: about 20 seconds of waiting, unless the endpoint names a delay
KEY_VARIABLE = "LIT_UNLEARN_JUDGE_KEY"
_FOREIGN_HEADERS = ("OpenAI-Organization", "OpenAI-Project")  # from OPENAI_* variables, meant for another endpoint


class ReplyCache:
    """Replies on disk, one file for each model and prompt, so that a repeated or interrupted run pays for no prompt twice.

    Args:
        model: The judge's name.
        folder: Of the files; ``None`` for ``$LIT_UNLEARN_CACHE/judge``, or else ``~/.cache/lit_unlearn/judge``.
    """

    def __init__(self, model: str, folder: Path | None = None) -> None:
        self.model = model
        self.folder = cache_folder() / "judge" if folder is None else expand_path(folder)

    def read_reply(self, prompt: str) -> str | None:
        """Return the reply to a prompt, or ``None`` if there is none yet."""
        try:
            return str(read_json(self._find_file(prompt))["reply"])
        except (FileNotFoundError, ValueError):
            # A ValueError is a file that was cut short, for example by a crash of the machine: ask again.
            return None

    def write_reply(self, prompt: str, reply: str) -> None:
        """Keep a reply."""
        write_json(self._find_file(prompt), {"model": self.model, "prompt": prompt, "reply": reply}, private=True)

    def _find_file(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()
        return self.folder / f"{digest}.json"


class Endpoint:
    """A judge behind an OpenAI-compatible address.

    Args:
        url: What precedes ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: Name by which the endpoint knows the judge.
        key: Bearer token; empty where none is asked for. It is never written or printed.

    Raises:
        ConfigError: If ``url`` is no address, or the ``openai`` package is missing.
    """

    def __init__(self, url: str, model: str, key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"`url` must start with http:// or https://, not '{url}'.", owner=self, argument="url")
        try:
            from openai import DefaultHttpxClient, OpenAI, Timeout
        except ImportError:
            raise ConfigError('the judge needs the openai package: pip install "lit-unlearn[judge]"') from None
        self.url = redact_secrets(url)
        self.model = model
        self._key = key or "no-key"  # the client refuses an empty one
        timeout = Timeout(TIMEOUT, connect=min(TIMEOUT, 10.0))
        # A redirect would take questions and answers to a place that the user has not named.
        http_client = DefaultHttpxClient(follow_redirects=False, timeout=timeout)
        self._client = OpenAI(base_url=url, api_key=self._key, timeout=timeout, http_client=http_client)

    def complete_prompt(self, prompt: str, retries: int) -> str:
        """Return the judge's reply at temperature 0.

        Args:
            prompt: The user's message.
            retries: Attempts after the first one.

        Raises:
            RequestFailed: If this request failed.
            EndpointError: If every other one would fail, too: the key is refused, nothing listens, or there is no such model.
        """
        from openai import OpenAIError, omit

        client = self._client.with_options(max_retries=retries)
        headers: dict[str, Any] = {"Authorization": f"Bearer {self._key}", **dict.fromkeys(_FOREIGN_HEADERS, omit)}
        messages: list[Any] = [{"role": "user", "content": prompt}]
        try:
            completion = client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, extra_headers=headers
            )
        except (OpenAIError, ValueError) as error:
            # A ValueError: the answer is no JSON, or no text at all.
            # Without the chain, which would show the endpoint's answer: it may repeat the key.
            raise self._describe_failure(error) from None
        return _read_completion(completion)

    def _describe_failure(self, error: Exception) -> Exception:
        status = getattr(error, "status_code", 0)
        cause = error.__cause__
        text = f"{error} {cause or ''}".replace(self._key, "[key]")
        reason = " ".join(text.split())[:300]
        if 300 <= status < 400:
            location = redact_secrets(str(error.response.headers.get("location", "nowhere")))  # type: ignore[attr-defined]
            return EndpointError(
                f"the judge at {self.url} redirects to {location}, where nothing was sent. If that is the judge, give its address "
                "as `url`."
            )
        if status in (401, 402, 403) or getattr(error, "code", None) == "insufficient_quota":
            return EndpointError(
                f"the judge at {self.url} refuses ({reason}): set {KEY_VARIABLE} to a key that may use it."
            )
        if status == 404:
            return EndpointError(f"at {self.url} there is no model '{self.model}' or no /chat/completions ({reason}).")
        # Names, not classes: they are httpx's or httpx2's, depending on openai's version.
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            return EndpointError(f"the judge at {self.url} cannot be reached ({reason}): is it running there?")
        return RequestFailed(reason)


def _read_completion(completion: Any) -> str:
    try:
        choice = completion.choices[0]
        text, finish_reason = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        # openai does not check what an endpoint sends.
        raise RequestFailed("the endpoint's answer is no chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise RequestFailed(f"the judge's reply is empty (finish reason: {finish_reason})")
    return text


def request_replies(
    prompts: Sequence[str], endpoint: Endpoint, cache: ReplyCache, workers: int
) -> dict[str, str | RequestFailed]:
    """Return the reply to every prompt: from the cache, else from the endpoint.

    Args:
        prompts: Equal ones are sent once.
        endpoint: The judge.
        cache: Gets every reply as soon as it comes.
        workers: Requests at a time.

    Raises:
        EndpointError: If no request can succeed.
    """
    replies: dict[str, str | RequestFailed] = {}
    missing = []
    # Equal prompts once, in order; a set would send them in another order each time.
    for prompt in dict.fromkeys(prompts):
        cached = cache.read_reply(prompt)
        if cached is None:
            missing.append(prompt)
        else:
            replies[prompt] = cached

    def request_reply(prompt: str, retries: int) -> str | RequestFailed:
        try:
            reply = endpoint.complete_prompt(prompt, retries)
        except RequestFailed as failure:
            return failure
        cache.write_reply(prompt, reply)
        return reply

    # The first one goes alone and without retries: a wrong key or address ends here, at once.
    if missing:
        first = request_reply(missing[0], 0)
        if isinstance(first, str):
            replies[missing.pop(0)] = first

    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(request_reply, prompt, RETRIES): prompt for prompt in missing}
        for future in tqdm(as_completed(futures), total=len(futures), desc="judge", unit="reply", leave=False):
            replies[futures[future]] = future.result()
    finally:
        # After an error, prompts that wait in the queue would still be sent, and paid for.
        pool.shutdown(cancel_futures=True)
    return replies
