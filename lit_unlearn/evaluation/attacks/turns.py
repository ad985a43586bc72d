"""Earlier turns, which attacks by the prompt put before a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_unlearn.data.formats import Conversation, Message
from lit_unlearn.errors import ConfigError

SEPARATOR = "\n\n"
"""Stands between turns that are written out as text."""


def put_turns_first(conversation: Conversation, turns: Sequence[tuple[str, str]]) -> Conversation:
    """Put questions with their answers before a conversation, after its system message.

    Args:
        conversation: Whose last turn stays the only one that is supervised.
        turns: Questions and answers, in order.

    Example:
        >>> put_turns_first(Conversation.from_turn("And you?", "Ada."), [("Who are you?", "Bob.")]).texts
        ('Who are you?', 'Bob.', 'And you?', 'Ada.')
    """
    start = 0
    while conversation.messages[start].role in ("system", "developer"):
        start += 1
    added: list[Message] = []
    for question, answer in turns:
        added += [Message("user", question), Message("assistant", answer)]
    messages = (*conversation.messages[:start], *added, *conversation.messages[start:])
    return replace(conversation, messages=messages, supervised=(len(messages) - 1,))


def join_turns(conversation: Conversation, template: str) -> Conversation:
    r"""Write all turns but the last one into its question, for models that were fine-tuned on one turn and have no chat template.

    Put into the same template, the question continues the text of the earlier turns as if they were rows of the training file.

    Args:
        conversation: Questions and answers by turns.
        template: Text with ``{question}`` and ``{answer}``: that of the prompts.

    Raises:
        ConfigError: If there are messages other than questions with answers, which the template has no place for.

    Example:
        >>> asked = put_turns_first(Conversation.from_turn("And you?", "Ada."), [("Who are you?", "Bob.")])
        >>> join_turns(asked, "Q: {question}\nA: {answer}").question
        'Who are you?\nA: Bob.\n\nQ: And you?'
    """
    roles = [message.role for message in conversation.messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ConfigError(
            "`template` has a place for questions with answers only, but a row has other messages, such as a system message: set "
            "`template` to null, for turns of the chat template.",
            argument="template",
        )
    # By its parts: a question may itself have the characters "{answer}".
    before_question, _, rest = template.partition("{question}")
    between, _, after_answer = rest.partition("{answer}")
    text = ""
    for question, answer in zip(conversation.texts[:-2:2], conversation.texts[1:-2:2], strict=True):
        text += f"{before_question}{question}{between}{answer}{after_answer}{SEPARATOR}"
    text += before_question + conversation.question
    # The template writes the start of the first turn.
    messages = (Message("user", text.removeprefix(before_question)), conversation.messages[-1])
    return replace(conversation, messages=messages, supervised=(1,))
