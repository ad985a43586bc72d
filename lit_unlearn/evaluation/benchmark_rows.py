"""The rows that a benchmark measures, tokenised, and how they are counted and described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.evaluation.results import Values, content_digest


class BenchmarkExample(NamedTuple):
    """One row of a benchmark, tokenised.

    Args:
        texts: Texts that are copied to the results, such as ``question`` and ``answer``.
        sequences: Token sequences to score, by kind: ``answer``, ``wrong``, …
        prompt: Token ids to continue; ``None`` if nothing is generated.
    """

    texts: dict[str, str]
    sequences: dict[str, list[Example]]
    prompt: list[int] | None = None


class BenchmarkStream(NamedTuple):
    """The examples of one set, and how answers to them are generated.

    Args:
        examples: At least one.
        source: Where they came from, for the results.
        max_new_tokens: Longest answer, in tokens.
        stop: An answer ends before the first of these strings.
        hidden_id: As for `generate`.
    """

    examples: list[BenchmarkExample]
    source: str
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    hidden_id: int | None = None


def count_work(streams: Mapping[str, BenchmarkStream]) -> int:
    """Count the sequences to score and the answers to generate."""
    total = 0
    for stream in streams.values():
        for example in stream.examples:
            total += sum(map(len, example.sequences.values())) + (example.prompt is not None)
    return total


def count_answer_tokens(example: BenchmarkExample) -> int:
    """Count the tokens of an answer without its end; 0 of raw text, which is scored in chunks."""
    tokens = 0
    for sequence in example.sequences.get("answer", []):
        tokens += len(sequence.labels) - sequence.labels.count(IGNORED)
    return max(tokens - 1, 0)


def explain_cut_answers(stream: BenchmarkStream) -> str | None:
    """Return why generated answers cannot show that an answer is not given: one may be longer than what is generated.

    Args:
        stream: Of questions; ``None`` is returned if all answers fit.
    """
    answers: list[Example] = []
    for example in stream.examples:
        answers += example.sequences.get("answer", [])
    cut = sum(answer.is_cut for answer in answers)
    if cut:
        # How long they are is not known.
        return f"`max_length` cuts the end of {cut} of {len(answers)} answers"
    longest = max(map(count_answer_tokens, stream.examples), default=0)
    if longest > stream.max_new_tokens:
        return f"{stream.max_new_tokens} tokens are generated, and the longest answer has {longest}"
    return None


def describe_stream(stream: BenchmarkStream) -> Values:
    """Return the source, the number of rows, and digests of texts and tokens, by which results are compared."""
    texts, tokens, prompts, masks = [], [], [], []
    for example in stream.examples:
        texts.append(dict(example.texts))
        ids = []
        for of_kind in example.sequences.values():
            ids += [sequence.input_ids for sequence in of_kind]
            masks += [sequence.attention_mask for sequence in of_kind if sequence.attention_mask is not None]
        tokens.append(ids)
        prompts.append(example.prompt)
    # Tokens that are hidden from others give other values. Only then, so that the results of earlier versions can be compared.
    content = [tokens, prompts, masks] if masks else [tokens, prompts]
    return {
        "source": stream.source,
        "rows": len(stream.examples),
        "texts": content_digest(texts),
        "tokens": content_digest(content),
    }
