"""Generation in batches, greedy or sampled: each prompt gets the text that it would get alone, only sooner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from lit_unlearn.errors import ConfigError, DataError, ModelError
from lit_unlearn.models.adapters import inner_model
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_unlearn.models import LanguageModel


@overload
def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = ...,
    hidden_id: int | None = ...,
    token_budget: int = ...,
    sampling: None = ...,
    prompt_ids: Sequence[str] | None = ...,
) -> list[str]: ...


@overload
def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = ...,
    hidden_id: int | None = ...,
    token_budget: int = ...,
    sampling: Sampling,
    prompt_ids: Sequence[str] | None = ...,
) -> list[list[str]]: ...


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    hidden_id: int | None = None,
    token_budget: int = 8192,
    sampling: Sampling | None = None,
    prompt_ids: Sequence[str] | None = None,
) -> list[str] | list[list[str]]:
    """Answer prompts with the likeliest token at every step, or sample; up to rounding, no answer depends on its batch.

    Of the model's ``generation_config`` only the end tokens count. Prompts share a batch, padded on the left, where a
    short trial shows that this changes nothing; elsewhere only prompts of one length do, and if need be none.

    Args:
        lm: Loaded, with a tokenizer; it is left as it was.
        prompts: Token ids, at least one each.
        max_new_tokens: Longest answer, in tokens.
        stop: An answer ends before the first of these strings.
        hidden_id: Tokens of prompts with this id are hidden from all others, and have no position of their own; ``None`` for none.
        token_budget: Largest batch, in tokens: answers times the longest prompt and answer. One answer may exceed it.
        sampling: How answers are drawn; ``None`` for the likeliest token.
        prompt_ids: Names of the prompts, which decide their random numbers: a prompt has the same samples beside any others,
            in any order and on any process. ``None`` for their positions, from 0.

    Returns:
        The answer to each prompt, in the order given, without special tokens; with ``sampling``, a list of its samples.

    Raises:
        ModelError: If there is no tokenizer, or logits that are sampled from are not numbers.
        ConfigError: If there is no token to generate, or a stop string is empty.
        DataError: If a prompt is empty or too long.
    """
    check_prompts(lm, prompts, max_new_tokens, stop)
    model, tokenizer = inner_model(lm.model), cast("PreTrainedTokenizerBase", lm.tokenizer)
    num_samples = 1 if sampling is None else sampling.samples
    if prompt_ids is None:
        prompt_ids = [str(number) for number in range(len(prompts))]

    # Every sample is a row of a batch; those of a prompt follow each other.
    rows = list(product(range(len(prompts)), range(num_samples)))
    lengths = [len(prompts[number]) for number, _ in rows]
    answers = [""] * len(rows)
    with evaluation_mode(model), _greedy_decoding(model, tokenizer), _gathering_weights(lm):
        for batch in _plan_batches(lm, lengths, max_new_tokens, token_budget):
            inputs = _pad_left(lm, [prompts[rows[i][0]] for i in batch], hidden_id)
            sampler = None
            if sampling is not None:
                numbers = [sampling.random_numbers(prompt_ids[rows[i][0]], rows[i][1]) for i in batch]
                sampler = Sampler(sampling, numbers)
            texts = _answer_batch(lm, tokenizer, inputs, max_new_tokens, stop, sampler)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
    if sampling is None:
        return answers
    return [answers[start : start + num_samples] for start in range(0, len(rows), num_samples)]


def continue_prompt(
    lm: LanguageModel, prompt: Sequence[int], max_new_tokens: int, hidden_id: int | None = None
) -> tuple[list[int], bool]:
    """Return the tokens that `generate` makes a text of, and whether the last one is an end token.

    Scoring needs the tokens: a model that was damaged may generate bytes that are no character, and text loses them.
    """
    model, tokenizer = inner_model(lm.model), cast("PreTrainedTokenizerBase", lm.tokenizer)
    with evaluation_mode(model), _greedy_decoding(model, tokenizer), _gathering_weights(lm):
        inputs = _pad_left(lm, [prompt], hidden_id)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, synced_gpus=lm.is_sharded)
        ids = output[0, len(prompt) :].tolist()
        return ids, ids[-1] in (model.generation_config.eos_token_id or ())


def check_prompts(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()
) -> None:
    """Raise the error of `generate` where it would, before anything is generated."""
    if lm.tokenizer is None:
        raise ModelError(
            "generated tokens become text, but the model has no tokenizer: set `tokenizer`.",
            owner=lm,
            argument="tokenizer",
        )
    if max_new_tokens < 1:
        raise ConfigError(f"`max_new_tokens` is {max_new_tokens}: give at least 1, the longest answer in tokens.")
    # True of a plain string as well, which would stop at each of its characters.
    if "" in stop:
        raise ConfigError(f"`stop` must be a list of strings that are not empty, but is {stop!r}.")

    positions = getattr(inner_model(lm.model).config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty, but an answer follows at least one token: leave it out.")
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, which with `max_new_tokens` {max_new_tokens} exceed the model's "
                f"{positions} positions (`max_position_embeddings`): shorten the prompt, or lower `max_new_tokens`.",
                argument="max_new_tokens",
            )


@contextmanager
def _gathering_weights(lm: LanguageModel) -> Iterator[None]:
    """Let every call of a sharded model within the block gather its weights, as `LanguageModel.forward` does.

    All processes must make the same calls: where they generate, they have the same prompts, and stop together.
    """
    if not lm.is_sharded:
        yield
        return
    model: Any = inner_model(lm.model)
    forward = model.forward

    # transformers reads the signature.
    @wraps(forward)
    def gather_and_run(*args: Any, **kwargs: Any) -> Any:
        return lm.run_with_whole_weights(forward, *args, **kwargs)

    had_own = "forward" in vars(model)
    model.forward = gather_and_run
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward


@contextmanager
def _greedy_decoding(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Give the model a plain ``generation_config`` within the block, so that none of its sampling or penalties applies.

    It stays greedy when answers are sampled: a `Sampler` then leaves only the token that it drew.
    """
    from transformers import GenerationConfig

    # A repetition penalty, for one, would also penalise the padding tokens of a shorter prompt.
    users_config = model.generation_config
    ends = tokenizer.eos_token_id if users_config.eos_token_id is None else users_config.eos_token_id
    if isinstance(ends, int):
        ends = [ends]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Padding is masked, so any token will do.
    pad = 0 if pad is None else pad
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = users_config


def _plan_batches(lm: LanguageModel, lengths: Sequence[int], max_new_tokens: int, token_budget: int) -> list[list[int]]:
    """Return which prompts share a batch; the longest come first, so that a lack of memory shows at once."""
    longest = max(lengths, default=0) + max_new_tokens
    may_pad = not _rotates_by_longest(inner_model(lm.model), longest) and _keeps_apart(lm, padding=4)
    may_share = may_pad or _keeps_apart(lm, padding=0)

    # In descending order the first prompt of a batch is its width, so that little is padded.
    batches: list[list[int]] = []
    width = 0  # of the last batch: the length of its first prompt
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        suits = may_pad or (may_share and lengths[i] == width)
        if batches and suits and (len(batches[-1]) + 1) * (width + max_new_tokens) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            width = lengths[i]
    return batches


def _rotates_by_longest(model: Any, longest: int) -> bool:
    """Return whether a batch's longest row decides the rotation of all rows: LongRoPE, as in Phi-3 with 128k positions."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # Either the parameters of all layers, or of each type of layer under its name.
    by_type = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in [parameters, *by_type]:
        if rope.get("rope_type") == "longrope" and longest > rope["original_max_position_embeddings"]:
            return True
    return False


def _keeps_apart(lm: LanguageModel, padding: int) -> bool:
    """Return whether a prompt has the same logits alone and, padded on the left, beside another; false if they are nan."""
    prompt, longer_prompt = range(1, 5), range(5, 9 + padding)
    model, outputs = inner_model(lm.model), []
    # Autocast's rounding would look like a difference.
    with torch.autocast(lm.input_device.type, enabled=False):
        for prompts in ([prompt], [prompt, longer_prompt]):
            output = model.generate(
                **_pad_left(lm, prompts),
                max_new_tokens=2,
                synced_gpus=lm.is_sharded,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits = torch.stack([step[0] for step in output.logits])
            outputs.append(logits - logits.mean(dim=-1, keepdim=True))
    alone, beside = outputs
    # Measured in float32 at random weights: 3e-7, but 0.2 for RecurrentGemma, 0.5 for RWKV and for misplaced positions.
    return bool((alone - beside).norm() <= max(0.01, 8 * torch.finfo(model.dtype).eps) * alone.norm())


def _pad_left(lm: LanguageModel, prompts: Sequence[Sequence[int]], hidden_id: int | None = None) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, shape ``(B, T)``, on the model's device."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), inner_model(lm.model).generation_config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = torch.tensor([int(token != hidden_id) for token in prompt])
    return {"input_ids": ids.to(lm.input_device), "attention_mask": mask.to(lm.input_device)}


def _answer_batch(
    lm: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    stop: Sequence[str],
    sampler: Sampler | None,
) -> list[str]:
    """Return the answers to one batch, each cut before its first end token or stop string."""
    model, start = inner_model(lm.model), inputs["input_ids"].shape[1]
    ends = model.generation_config.eos_token_id or ()

    def has_stopped(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        is_stopped = torch.zeros(len(ids), dtype=torch.bool)
        for row, text in enumerate(tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)):
            is_stopped[row] = any(string in text for string in stop)
        return is_stopped.to(ids.device)

    # transformers' own `stop_strings` also find those that begin in the prompt, and take 1 s for 128 000 entries.
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        synced_gpus=lm.is_sharded,
        stopping_criteria=[has_stopped] if stop else [],
        logits_processor=[] if sampler is None else [sampler],
    )
    answers = []
    for ids in output[:, start:].tolist():
        answer = list(takewhile(lambda token: token not in ends, ids))
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        # All are looked for before the cut, which could go through one that starts earlier.
        cuts = [text.index(string) for string in stop if string in text]
        answers.append(text[: min(cuts, default=len(text))])
    return answers
