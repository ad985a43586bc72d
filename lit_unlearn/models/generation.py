"""Greedy generation in batches: each prompt gets the text that it would get alone, only sooner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lit_unlearn.models import LanguageModel
from lit_unlearn.models.adapters import inner_model
from lit_unlearn.models.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    token_budget: int = 8192,
) -> list[str]:
    """What a model answers with the likeliest token at every step; up to rounding, no answer depends on its batch.

    Of the model's ``generation_config`` only the end tokens count. Prompts share a batch, padded on the left, where a
    short trial shows that this changes nothing; elsewhere only prompts of one length do, and if need be none.

    Args:
        lm: Loaded, with a tokenizer; it is left as it was.
        prompts: Token ids, at least one each.
        max_new_tokens: Longest answer, in tokens.
        stop: An answer ends before the first of these strings.
        token_budget: Largest batch, in tokens: prompts times the longest prompt and answer. One prompt may exceed it.

    Returns:
        The answer to each prompt, in the order given, without special tokens.

    Raises:
        ValueError: If there is no tokenizer, no token to generate, an empty stop string, or an empty or too long prompt.
    """
    check_prompts(lm, prompts, max_new_tokens, stop)
    model, tokenizer = inner_model(lm.model), cast("PreTrainedTokenizerBase", lm.tokenizer)
    answers = dict[int, str]()
    with evaluation_mode(model), _likeliest_tokens(model, tokenizer):
        for batch in _batches(model, [len(prompt) for prompt in prompts], max_new_tokens, token_budget):
            rows = [prompts[i] for i in batch]
            answers |= zip(batch, _answer(model, tokenizer, rows, max_new_tokens, stop), strict=True)
    return [answers[i] for i in range(len(prompts))]


def continue_prompt(lm: LanguageModel, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], bool]:
    """The tokens that `generate` makes a text of, and whether the last one is an end token.

    The text would not do where tokens are to be scored: bytes that are no character, which a model that has lost its way
    may say, are lost in it.
    """
    model, tokenizer = inner_model(lm.model), cast("PreTrainedTokenizerBase", lm.tokenizer)
    with evaluation_mode(model), _likeliest_tokens(model, tokenizer):
        ids = model.generate(**_padded(model, [prompt]), max_new_tokens=max_new_tokens)[0, len(prompt) :].tolist()
        return ids, ids[-1] in (model.generation_config.eos_token_id or ())


def check_prompts(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()
) -> None:
    """Raises the ValueError of `generate` where it would."""
    if lm.tokenizer is None:
        raise ValueError("generation makes text of tokens, but the model has no tokenizer: set `model.lm.tokenizer`.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {max_new_tokens}: give at least 1, the longest answer in tokens.")
    if "" in stop:  # which is also in every string
        raise ValueError(f"`stop` must be a list of strings that are not empty, but is {stop!r}.")
    positions = getattr(inner_model(lm.model).config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty, but an answer follows at least one token: leave it out.")
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with `max_new_tokens` {max_new_tokens} exceed the model's "
                f"{positions} positions (`max_position_embeddings`): shorten the prompt, or lower `max_new_tokens`."
            )


@contextmanager
def _likeliest_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within the block the model has a plain ``generation_config``: a penalty on repetition would count padding as said."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)  # masked: any will do
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = own


def _batches(model: Any, lengths: Sequence[int], max_new_tokens: int, token_budget: int) -> list[list[int]]:
    """Which prompts go together; the longest go first, so that too little memory shows at once."""
    mixed = not _follows_longest(model, max(lengths, default=0) + max_new_tokens) and _keeps_apart(model, padding=4)
    together = mixed or _keeps_apart(model, padding=0)
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        batch = batches[-1] if batches else []
        fits = batch and (len(batch) + 1) * (lengths[batch[0]] + max_new_tokens) <= token_budget
        if not fits or not (mixed or (together and lengths[i] == lengths[batch[0]])):
            batches.append([])
        batches[-1].append(i)
    return batches


def _follows_longest(model: Any, longest: int) -> bool:
    """Whether a batch's longest row decides how all its rows are rotated: LongRoPE, as in Phi-3 with 128k positions."""
    ropes = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    ropes = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # of all layers, or by their type
    limits = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    return longest > min(limits, default=longest)


def _keeps_apart(model: Any, padding: int) -> bool:
    """Whether a row has the same logits alone and, with padding on its left, beside another; never so if they are nan."""
    settings = {"max_new_tokens": 2, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    row, other = range(1, 5), range(5, 9 + padding)
    with torch.autocast(model.device.type, enabled=False):  # whose rounding would look like a difference
        outputs = [model.generate(**_padded(model, rows), **settings) for rows in ([row], [row, other])]
    alone, beside = (torch.stack([step[0] - step[0].mean() for step in output.logits]) for output in outputs)
    # Measured in float32 at random weights: 3e-7, but 0.2 for RecurrentGemma, 0.5 for RWKV and for misplaced positions.
    return bool((alone - beside).norm() <= max(0.01, 8 * torch.finfo(model.dtype).eps) * alone.norm())


def _padded(model: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width, pad = max(map(len, prompts)), model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + [*prompt] for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    return {"input_ids": ids, "attention_mask": mask}


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Sequence[int]], max_new_tokens: int, stop: Sequence[str]
) -> list[str]:
    """The answers to one batch, each without its first end token or stop string and what follows."""
    inputs = _padded(model, rows)
    start = inputs["input_ids"].shape[1]

    def stopped(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return torch.tensor([any(string in text for string in stop) for text in texts], device=ids.device)

    def cut(ids: list[int]) -> str:
        said = takewhile(lambda token: token not in (model.generation_config.eos_token_id or ()), ids)
        text = str(tokenizer.decode([*said], skip_special_tokens=True))
        return text[: min((text.index(string) for string in stop if string in text), default=len(text))]

    # transformers' own `stop_strings` also find those that begin in the prompt, and take 1 s for a vocabulary of 128 000
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, stopping_criteria=[stopped] if stop else [])
    return [cut(ids) for ids in output[:, start:].tolist()]
