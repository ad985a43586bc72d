"""Ask a model behind an OpenAI-compatible server, as its users ask it."""

from __future__ import annotations

import math
from typing import Any

from lit_unlearn.data.chat_template import add_system
from lit_unlearn.data.encoding import find_literal_template
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.formats import Conversation
from lit_unlearn.errors import ConfigError, EndpointError
from lit_unlearn.evaluation.endpoint import Completion, Endpoint, RequestFailed
from lit_unlearn.evaluation.inspection import Answer, Reply

KEY_VARIABLE = "LIT_UNLEARN_SERVER_KEY"
_RETRIES = 2  # of a request that fails for the moment


class ServedModel:
    """A model behind an OpenAI-compatible server, such as ``transformers serve``, vLLM or llama.cpp's.

    The server applies its own chat template. It does not score the right answer, and gives the probabilities of its own tokens only
    if it returns ``logprobs``.

    Args:
        url: What precedes ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: Name by which the server knows it; ``None`` for the only one that the server lists.
        key: Bearer token; empty where none is asked for. It is never written or printed.

    Raises:
        ConfigError: If ``url`` is no address, the ``openai`` package is missing, or the server lists no model or several.
        EndpointError: If the server has to be asked for its models, and does not answer.
    """

    def __init__(self, url: str, model: str | None = None, key: str = "") -> None:
        self._endpoint = Endpoint(url, model or "", key, "server", KEY_VARIABLE)
        self._asks_for_logprobs = True
        if model is None:
            self._endpoint.model = self._find_only_model()

    @property
    def name(self) -> str:
        """Name by which the server knows the model."""
        return self._endpoint.model

    @property
    def url(self) -> str:
        """Address of the server, without a password."""
        return self._endpoint.url

    def ask(
        self,
        question: str | Conversation,
        right: str | None = None,
        *,
        encoding: EncodingSettings | None = None,
        max_new_tokens: int = 100,
    ) -> Reply:
        """Let the model answer a question with the likeliest token at every step.

        Args:
            question: The question, or a conversation whose last turn is asked for.
            right: The right answer, if it is known, to compare with.
            encoding: ``template`` sends the text that it gives to ``/completions``; ``chat.system`` is sent as a system message.
            max_new_tokens: Longest answer, in tokens.

        Raises:
            ConfigError: If ``encoding`` has settings of the chat template, which is the server's.
            EndpointError: If the server cannot be reached, has no such model, or sends no answer.
        """
        asked = Conversation.from_turn(question, "") if isinstance(question, str) else question
        request = _build_request(asked, encoding or EncodingSettings())
        try:
            completion = self._request({**request, "max_tokens": max_new_tokens})
        except RequestFailed as failure:
            raise EndpointError(
                f"the server at {self.url} gave no answer of the model '{self.name}': {failure}"
            ) from None
        expected = None
        if right is not None:
            expected = Answer(right.strip(), [right.strip(), ""], [None, None], None, True)
        return Reply(_build_answer(completion), expected)

    def _request(self, request: dict[str, Any]) -> Completion:
        if self._asks_for_logprobs:
            # One token per place: the protocol of chats takes a switch, that of texts a number.
            asked = {**request, "logprobs": 1 if "prompt" in request else True}
            try:
                return self._endpoint.complete(_RETRIES, **asked)
            except RequestFailed:
                # Some servers refuse the field. If that is not the reason, the request fails again.
                self._asks_for_logprobs = False
        return self._endpoint.complete(_RETRIES, **request)

    def _find_only_model(self) -> str:
        try:
            names = self._endpoint.list_models()
        except RequestFailed as failure:
            raise EndpointError(f"the server at {self.url} does not list its models ({failure}).") from None
        if len(names) != 1:
            listed = ", ".join(f"'{name}'" for name in names[:20]) or "none"
            raise ConfigError(f"the server at {self.url} lists {len(names)} models ({listed}): name the one to ask.")
        return names[0]


def _build_request(asked: Conversation, encoding: EncodingSettings) -> dict[str, Any]:
    """Return a conversation in the protocol's words: as messages, or by a literal template as a text to continue."""
    template, chat = find_literal_template(asked, encoding), encoding.chat
    if template is not None:
        if not asked.is_single_turn:
            raise ConfigError("`template` is for one turn, and a row has several: leave it out.", argument="template")
        before = template.partition("{answer}")[0].replace("{question}", asked.question)
        # The space belongs to the first token of the answer, as in training.
        return {"prompt": before.rstrip(" ")}
    if chat is not None and (chat.template is not None or chat.args):
        raise ConfigError("`chat.template` and `chat.args` cannot be sent: the server applies its own chat template.")
    messages = asked.messages[:-1]
    if chat is not None:
        messages = tuple(add_system(messages, chat))
    return {"messages": [{"role": message.role, "content": message.content} for message in messages]}


def _build_answer(completion: Completion) -> Answer:
    text = completion.text.strip()
    tokens: list[str] = [completion.text]
    probabilities: list[float | None] = [None]
    if completion.tokens is not None:
        tokens = [token for token, _ in completion.tokens]
        probabilities = [math.exp(logp) for _, logp in completion.tokens]

    ended = completion.finish_reason == "stop"
    lists_end = len(tokens) > 1 and "".join(tokens[:-1]).strip() == text
    if ended and not lists_end:
        # An answer that has ended ends with its end token, which most servers leave out.
        tokens, probabilities = [*tokens, ""], [*probabilities, None]

    known = [probability for probability in probabilities if probability is not None]
    probability = None
    if len(known) == len(probabilities):
        probability = math.prod(known) ** (1 / len(known))
    return Answer(text, tokens, probabilities, probability, ended)
