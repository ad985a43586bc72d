"""Measure how fast questions are answered, beside plain `transformers.generate` on the same prompts.

    python -m benchmarks.generation --tofu FOLDER     # SmolLM2-135M-Instruct on TOFU's forget questions
    python -m benchmarks.generation --shape toy       # random weights and prompts

ours    `models.generation.generate` as TOFU's benchmark calls it: prompts sorted by length, in batches of at most 8192 tokens, after two
        short trials of whether the model may share batches at all, which count.
plain   ``model.generate`` on batches of ``--batch-size`` prompts in the order given, padded on the left; greedy, up to the end token.

Both take turns in one process. Shown are the median time, the tokens per second (those of the plain answers, with their end tokens), and
the median of the ratio within a round. Other batches round differently, so that a near tie may fall to another token: in float32 an
answer that differs is an error, in 16 bits their number is shown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, format_machine
from benchmarks.random_llama import SHAPES, Shape, build_model
from benchmarks.timing import median_ratio, synchronize, take_turns
from lit_unlearn import LanguageModel
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.generation import generate
from lit_unlearn.utils.io import write_json

Prompts = list[list[int]]


def make_random_model(shape: Shape, device: str, dtype: torch.dtype) -> LanguageModel:
    """Return a model with random weights, and a tokenizer that has a word for every id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, **{f"w{number}": number for number in range(1, shape.vocabulary)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="</s>")), eos_token="</s>", pad_token="</s>"
    )
    return LanguageModel.wrap(build_model(shape, device, dtype), tokenizer)


def make_random_prompts(shape: Shape, number: int) -> Prompts:
    """Return prompts as long as TOFU's questions in a chat template, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for length in torch.randint(36, 55, (number,), generator=generator).tolist():
        prompts.append(torch.randint(1, shape.vocabulary, (length,), generator=generator).tolist())
    return prompts


def load_smollm2(device: str, dtype: torch.dtype) -> LanguageModel:
    """Return SmolLM2-135M-Instruct."""
    from benchmarks.smollm2 import find_model

    lm = LanguageModel(str(find_model()))
    lm.load(dtype, device)
    return lm


def read_prompts(tofu: str, lm: LanguageModel, number: int) -> Prompts:
    """Return the prompts of TOFU's first forget questions, in the tokenizer's chat template."""
    from lit_unlearn.data.tofu import tofu_source
    from lit_unlearn.models.prompts import encode_prompts

    rows = tofu_source(tofu, "forget10").load("forget", argument="source").to_list()[:number]
    assert lm.tokenizer is not None
    return encode_prompts([row["question"] for row in rows], lm.tokenizer)


def answer_plainly(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> Prompts:
    """Return the tokens of every answer, up to its end token, from plain batches of `transformers.generate`."""
    model: Any = lm.causal_lm
    tokenizer: Any = lm.tokenizer
    end, device = tokenizer.eos_token_id, lm.input_device
    answers: Prompts = []
    with evaluation_mode(lm.causal_lm):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.full((len(batch), width), end)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=end,
                pad_token_id=end,
            )
            for answer in output[:, width:].tolist():
                answers.append(answer[: answer.index(end) + 1] if end in answer else answer)
    return answers


def compare_generation(
    lm: LanguageModel, prompts: Prompts, max_new_tokens: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Measure both ways to answer prompts, in turns.

    Args:
        lm: Loaded, with a tokenizer that has an end token.
        prompts: Token ids.
        max_new_tokens: Longest answer.
        batch_size: Prompts of a plain batch.
        rounds: Turns of each.

    Raises:
        RuntimeError: If answers differ, and the model computes in float32.
    """
    tokenizer: Any = lm.tokenizer
    device = lm.input_device.type
    texts: dict[str, list[str]] = {}
    num_tokens = 0

    def run(name: str) -> float:
        nonlocal num_tokens
        gc.collect()
        synchronize(device)
        start = time.perf_counter()
        if name == "ours":
            texts[name] = generate(lm, prompts, max_new_tokens=max_new_tokens)
        else:
            answers = answer_plainly(lm, prompts, max_new_tokens, batch_size)
            texts[name] = tokenizer.batch_decode(answers, skip_special_tokens=True)
            num_tokens = sum(map(len, answers))
        synchronize(device)
        return time.perf_counter() - start

    names = ("plain", "ours")
    for name in names:
        run(name)
    dtype = lm.causal_lm.dtype
    same = sum(plain == ours for plain, ours in zip(texts["plain"], texts["ours"], strict=True))
    if same < len(prompts) and dtype == torch.float32:
        raise RuntimeError(
            f"{len(prompts) - same} of {len(prompts)} answers differ, although both sides compute in float32."
        )
    seconds = take_turns(rounds, {name: partial(run, name) for name in names})
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "answer_tokens": num_tokens,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "same_texts": same,
        "median_seconds": medians,
        "seconds_of_rounds": seconds,
        "tokens_per_second": {name: num_tokens / value for name, value in medians.items()},
        "time_ratio": median_ratio(seconds["ours"], seconds["plain"]),
    }


def format_report(results: dict[str, Any]) -> str:
    """Format the results as lines of text."""
    lines = [
        f"{results['prompts']} prompts of {results['prompt_tokens'] / results['prompts']:.0f} tokens, answers of "
        f"{results['answer_tokens'] / results['prompts']:.0f} (at most {results['max_new_tokens']}), {results['dtype']}"
    ]
    for name, seconds in results["median_seconds"].items():
        batches = f", batches of {results['batch_size']}" if name == "plain" else ""
        lines.append(f"{name}: {seconds:.3g} s, {results['tokens_per_second'][name]:,.0f} tokens/s{batches}")
    lines.append(
        f"ours / plain: {results['time_ratio']:.2f} of the time (median of {results['rounds']} rounds); "
        f"{results['same_texts']} of {results['prompts']} texts are the same"
    )
    return "\n".join(lines)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tofu", default="locuslab/TOFU", metavar="FOLDER", help="folder with TOFU's files, or a hub name"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, in place of SmolLM2-135M-Instruct"
    )
    parser.add_argument("--prompts", type=int, default=40, help="number of questions (default 40)")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="longest answer (default 80)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts of a plain batch (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default="build/bench/generation.json", help="file for the results")
    options = parser.parse_args(arguments)
    for name in ("prompts", "max_new_tokens", "batch_size", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    machine, dtype = describe_machine(options.device), getattr(torch, options.dtype)
    print(format_machine(machine))
    if options.shape is None:
        lm = load_smollm2(options.device, dtype)
        prompts = read_prompts(options.tofu, lm, options.prompts)
    else:
        lm = make_random_model(SHAPES[options.shape], options.device, dtype)
        prompts = make_random_prompts(SHAPES[options.shape], options.prompts)
    try:
        results = compare_generation(lm, prompts, options.max_new_tokens, options.batch_size, options.rounds)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model = options.shape or "SmolLM2-135M-Instruct"
    write_json(options.output, {"machine": machine, "model": model, **results})
    print(f"{model}: {format_report(results)}\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
