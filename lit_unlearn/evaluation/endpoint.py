"""An OpenAI-compatible address, and what its failures mean.

Retries after 429, 5xx, timeouts and lost connections are the ``openai`` client's own, with growing delays.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from lit_unlearn.errors import ConfigError, EndpointError
from lit_unlearn.utils.redaction import redact_secrets

TIMEOUT = 120.0  # seconds for one attempt
_FOREIGN_HEADERS = ("OpenAI-Organization", "OpenAI-Project")  # from OPENAI_* variables, meant for another endpoint


class RequestFailed(Exception):
    """The reason why there is no reply to one prompt; the replies to other prompts stay valid."""


class Completion(NamedTuple):
    """What a model said.

    Args:
        text: Its text.
        finish_reason: Why it ends there: ``"stop"`` at the end of the answer, ``"length"`` where it was cut.
        tokens: Each token's text and log-probability; ``None`` if the endpoint does not say.
    """

    text: str
    finish_reason: str | None
    tokens: list[tuple[str, float]] | None


class Endpoint:
    """A model behind an OpenAI-compatible address.

    Args:
        url: What precedes ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: Name by which the endpoint knows it.
        key: Bearer token; empty where none is asked for. It is never written or printed.
        role: What messages call it.
        key_variable: The environment variable of the key, for messages.

    Raises:
        ConfigError: If ``url`` is no address, or the ``openai`` package is missing.
    """

    def __init__(self, url: str, model: str, key: str, role: Literal["judge", "server"], key_variable: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"`url` must start with http:// or https://, not '{url}'.", owner=self, argument="url")
        try:
            from openai import DefaultHttpxClient, OpenAI, Timeout
        except ImportError:
            raise ConfigError(f'a {role} needs the openai package: pip install "lit-unlearn[judge]"') from None
        self._role, self._key_variable = role, key_variable
        self.url = str(redact_secrets(url))
        self.model: str = model
        self._key = key or "no-key"  # the client refuses an empty one
        timeout = Timeout(TIMEOUT, connect=min(TIMEOUT, 10.0))
        # A redirect would take questions and answers to a place that the user has not named.
        http_client = DefaultHttpxClient(follow_redirects=False, timeout=timeout)
        self._client = OpenAI(base_url=url, api_key=self._key, timeout=timeout, http_client=http_client)

    def complete_prompt(self, prompt: str, retries: int) -> str:
        """Return the reply to a user's message.

        Args:
            prompt: The message.
            retries: Attempts after the first one.

        Raises:
            RequestFailed: If this request failed, or the reply is empty.
            EndpointError: If every other one would fail, too: the key is refused, nothing listens, or there is no such model.
        """
        completion = self.complete(retries, messages=[{"role": "user", "content": prompt}])
        if not completion.text.strip():
            raise RequestFailed(f"the {self._role}'s reply is empty (finish reason: {completion.finish_reason})")
        return completion.text

    def complete(self, retries: int, **request: Any) -> Completion:
        """Return what the model says at temperature 0.

        Args:
            retries: Attempts after the first one.
            **request: ``messages`` of a chat, or as ``prompt`` a text to continue, with further fields of the protocol.

        Raises:
            RequestFailed: If this request failed, or what came back is no completion.
            EndpointError: If every other one would fail, too.
        """
        client = self._client.with_options(max_retries=retries)
        resource: Any = client.completions if "prompt" in request else client.chat.completions
        answer = self._send(resource.create, model=self.model, temperature=0, **request)
        try:
            choice = answer.choices[0]
            text = choice.text if "prompt" in request else choice.message.content
            completion = Completion(text or "", choice.finish_reason, _read_tokens(choice))
        except (AttributeError, IndexError, TypeError, ValueError):
            # openai does not check what an endpoint sends.
            raise RequestFailed("the endpoint's answer is no chat completion") from None
        if not isinstance(completion.text, str):
            raise RequestFailed("the endpoint's answer is no chat completion")
        return completion

    def list_models(self) -> list[str]:
        """Return the names of the models that the endpoint says it has.

        Raises:
            RequestFailed: If it does not say.
            EndpointError: If it cannot be asked.
        """
        try:
            # openai itself trips over an answer that is no JSON.
            listing = self._send(self._client.with_options(max_retries=0).models.list)
            return [str(model.id) for model in listing.data]
        except (AttributeError, TypeError):
            raise RequestFailed("the endpoint's answer is no list of models") from None

    def _send(self, create: Any, **request: Any) -> Any:
        from openai import OpenAIError, omit

        headers: dict[str, Any] = {"Authorization": f"Bearer {self._key}", **dict.fromkeys(_FOREIGN_HEADERS, omit)}
        try:
            return create(**request, extra_headers=headers)
        except (OpenAIError, ValueError) as error:
            # A ValueError: the answer is no JSON, or no text at all.
            # Without the chain, which would show the endpoint's answer: it may repeat the key.
            raise self._describe_failure(error) from None

    def _describe_failure(self, error: Exception) -> Exception:
        status = getattr(error, "status_code", 0)
        cause = error.__cause__
        text = f"{error} {cause or ''}".replace(self._key, "[key]")
        reason = " ".join(text.split())[:300]
        if 300 <= status < 400:
            location = redact_secrets(str(error.response.headers.get("location", "nowhere")))  # type: ignore[attr-defined]
            return EndpointError(
                f"the {self._role} at {self.url} redirects to {location}, where nothing was sent. If that is the {self._role}, give its address "
                "as `url`."
            )
        if status in (401, 402, 403) or getattr(error, "code", None) == "insufficient_quota":
            return EndpointError(
                f"the {self._role} at {self.url} refuses ({reason}): set {self._key_variable} to a key that may use it."
            )
        if status == 404:
            # Models are listed to find out a name: then there is none yet.
            what = f"no model '{self.model}' or no /chat/completions" if self.model else "no /models"
            return EndpointError(f"at {self.url} there is {what} ({reason}).")
        # Names, not classes: they are httpx's or httpx2's, depending on openai's version.
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            return EndpointError(f"the {self._role} at {self.url} cannot be reached ({reason}): is it running there?")
        return RequestFailed(reason)


def _read_tokens(choice: Any) -> list[tuple[str, float]] | None:
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is None:
        return None
    if getattr(logprobs, "token_logprobs", None):  # of the continuation of a text
        return [(str(token), float(logp)) for token, logp in zip(logprobs.tokens, logprobs.token_logprobs, strict=True)]
    content = getattr(logprobs, "content", None)
    if not content:
        return None
    return [(str(entry.token), float(entry.logprob)) for entry in content]
