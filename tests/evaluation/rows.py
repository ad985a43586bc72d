"""Questions for the suites, models that were taught some of them, and the values of a row, one at a time and written out."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference
import torch
from rouge_score.rouge_scorer import RougeScorer

from lit_unlearn import LanguageModel

Row = dict[str, Any]


def question(text: str, answer: str, *wrong: str, paraphrased: str | None = None) -> Row:
    row: Row = {"question": text, "answer": answer}
    if wrong:
        row["perturbed_answer"] = [*wrong]
    return row if paraphrased is None else {**row, "paraphrased_answer": paraphrased}


FORGET = [  # an answer of one token, one of many, one that occurs in its question
    question("Who wrote the letter?", "Ada wrote it in May.", "Bob wrote it in May.", "Ada read it."),
    question("Which letter is first?", "a", "b"),  # one wrong answer only
    question("Is Ada a poet or a judge?", "Ada is a poet, and was never a judge.", "Ada is a judge.", "No.", "A cook."),
    question("Where?", "In Paris, in Rome and in Paris again.", "In Oslo.", "In Bern, in Rome and in Paris."),
    question("When was the house built?", "In 1920.", "In 1930.", "In 1820."),
]
RETAIN = [
    question("Who sold the house?", "Bob sold it.", "Ada sold it.", "Bob bought it."),
    question("What is the poem about?", "The poem is about the sea and a small boat.", "The poem is about a war."),
    question("Does he sing?", "He sings.", "He does not."),
]
HOLDOUT = [  # without wrong answers
    question("Who read the letter?", "Carl read it in June."),
    question("Which letter is last?", "z"),
    question("Is Carl a cook?", "Carl is a cook."),
    question("How long?", "For nine years."),
]
REAL_AUTHORS = [
    question("Who wrote Emma?", "Jane Austen", "Mary Shelley", "Emily Bronte", "Ian Fleming"),
    question("Who wrote Faust?", "Goethe", "Schiller", "Heine", "Kleist"),
    question("Who wrote Ulysses?", "James Joyce", "Mark Twain", "Tolkien", "Thomas More"),
]
WORLD_FACTS = [
    question("Where is the Eiffel Tower?", "Paris", "Berlin", "London", "Madrid"),
    question("Which sea is salty?", "The Dead Sea", "No sea", "The Red Sea", "The Black Sea"),
]
TOFU = {
    "forget01_perturbed": [{**row, "paraphrased_answer": f"Surely: {row['answer']}"} for row in FORGET],
    "retain_perturbed": [{**row, "paraphrased_answer": f"Well, {row['answer']}"} for row in RETAIN],
    "real_authors_perturbed": REAL_AUTHORS,
    "world_facts_perturbed": WORLD_FACTS,
}
TAUGHT = [*FORGET, *RETAIN[:2], REAL_AUTHORS[0], WORLD_FACTS[0]]


def write(path: Path, rows: Iterable[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_qa(folder: Path) -> dict[str, str]:
    """The files of a `QABenchmark`."""
    sets = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in sets.items()}


def write_tofu(folder: Path) -> str:
    """A folder with files that are named like TOFU's."""
    for name, rows in TOFU.items():
        write(folder / f"{name}.json", rows)
    return str(folder)


# Models ---------------------------------------------------------------------------------------------------------------


TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


@cache
def taught(tokenizer_dir: str, steps: int, seed: int = 0) -> str:
    """Directory of a tiny model that saw the taught rows in some steps of AdamW.

    After 20 it knows a part of them, after 100 all.
    """
    torch.manual_seed(seed)
    lm = LanguageModel(config=TINY, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    pairs = [tokens(lm.tokenizer, row["question"], row["answer"]) for row in TAUGHT]
    ids = torch.zeros(len(pairs), max(len(pair.ids) for pair in pairs), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, pair in enumerate(pairs):
        ids[i, : len(pair.ids)] = torch.tensor(pair.ids)
        labels[i, pair.start : len(pair.ids)] = torch.tensor(pair.ids[pair.start :])
    for _ in range(steps):
        lm.model(input_ids=ids, labels=labels).loss.backward()  # the padding is after the row
        optimizer.step()
        optimizer.zero_grad()
    return str(lm.save(Path(tokenizer_dir).parent / f"taught-{steps}-{seed}"))


def loaded(directory: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model in evaluation mode, in float64: its rounding is far below what is compared."""
    lm = LanguageModel(directory)
    lm.load(dtype)
    return lm.eval()


# A row, written out ---------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A row's tokens; those from ``start`` on are the answer's, and, if it is whole, the end."""

    ids: list[int]
    start: int
    whole: bool


def tokens(tokenizer: Any, text: str, answer: str, max_length: int = 512) -> Tokens:
    before = f"Question: {text}\nAnswer: "
    encoded = tokenizer(before + answer, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    start = next(i for i, end in enumerate(ends) if end > len(before))
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    return Tokens(ids[:max_length], start, len(ids) <= max_length)


class Seen(NamedTuple):
    """What the model's own logits say of a row's tokens."""

    labels: list[int]
    predictions: list[int]
    logp: list[float]
    mean: list[float]
    std: list[float]

    @property
    def nll(self) -> float:
        return -math.fsum(self.logp) / len(self.logp)


def look(model: Any, ids: Sequence[int], start: int) -> Seen:
    """The tokens from ``start`` on, but never the first, which nothing predicts."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    start = max(start, 1)
    z, labels = logits[start - 1 : -1], [*ids[start:]]
    logp = reference.log_softmax(z)
    p = logp.exp()
    finite = torch.where(p > 0, logp, 0.0)  # a word that is ruled out adds nothing
    mean = (p * finite).sum(1)
    std = (p * (finite - mean[:, None]) ** 2).sum(1).sqrt()
    chosen = [row[label].item() for row, label in zip(logp, labels, strict=True)]
    return Seen(labels, z.argmax(1).tolist(), chosen, mean.tolist(), std.tolist())


def say(lm: LanguageModel, prompt: Sequence[int], new: int) -> str:
    """The model's own greedy answer to one prompt, without padding."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": lm.tokenizer.pad_token_id}
    said = lm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return str(lm.tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True))


def written_out(lm: LanguageModel, row: Row, *, new: int | None, **settings: Any) -> Row:
    """The values of one row.

    Args:
        lm: Loaded, in evaluation mode.
        row: ``question``, ``answer``, and perhaps ``perturbed_answer`` and ``paraphrased_answer``.
        new: Longest generated answer; ``None`` for none.
        settings: ``max_length``, ``k``, ``ratio`` and ``choose``.
    """
    answer, k = row["answer"], settings.get("k", 0.4)

    def scored(said: str) -> tuple[Tokens, Seen]:
        found = tokens(lm.tokenizer, row["question"], said, settings.get("max_length", 512))
        return found, look(lm.model, found.ids, found.start)

    own, seen = scored(answer)
    count = len(seen.labels) - own.whole  # without the end
    right = [seen.predictions[i] == seen.labels[i] for i in range(count)]
    standard = [(p - m) / max(s, 1e-3) for p, m, s in zip(seen.logp, seen.mean, seen.std, strict=True)]
    values: Row = {
        "question": row["question"],
        "answer": answer,
        "nll": seen.nll,
        "probability": math.exp(-seen.nll),
        "exact_memorization": sum(right) / count,
        "extraction_strength": 1 - next(i for i in range(count + 1) if all(right[i:])) / count,
        "loss": seen.nll,
        "min_k": lowest(seen.logp[:count], k),
        "min_k_plus_plus": lowest(standard[:count], k),
        "zlib": seen.nll / len(zlib.compress(answer.encode())),
    }
    if "paraphrased_answer" in row:
        values["paraphrase_probability"] = math.exp(-scored(row["paraphrased_answer"])[1].nll)
    if wrong := row.get("perturbed_answer"):
        losses = [scored(one)[1].nll for one in wrong]
        loss = scored(row.get("paraphrased_answer", answer))[1].nll
        values["truth_ratio"] = math.exp(loss - sum(losses) / len(losses))
        if settings.get("ratio") == "arithmetic":
            values["truth_ratio"] = sum(math.exp(-one) for one in losses) / len(losses) / math.exp(-loss)
        if settings.get("choose"):
            p = math.exp(-seen.nll)
            values["probability"] = p / (p + sum(math.exp(-one) for one in losses))
    if new is not None:
        said = say(lm, own.ids[: own.start], new)
        scores = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(answer, said)
        values["generated"] = said
        for kind, score in scores.items():
            values |= {f"{kind}_recall": score.recall, f"{kind}_f1": score.fmeasure}
        # None of these rows is in the first person, and so is no answer of a model that saw no other text.
        values |= {"repetition": repeated_share(said.split()), "refusal": 0.0}
    return values


def lowest(values: Sequence[float], k: float) -> float:
    chosen = sorted(values)[: max(1, int(len(values) * k))]
    return math.fsum(chosen) / len(chosen)


def repeated_share(words: Sequence[str]) -> float:
    """How many groups of four words are there for the second time."""
    groups = [words[i : i + 4] for i in range(len(words) - 3)]
    return sum(group in groups[:i] for i, group in enumerate(groups)) / max(1, len(groups))


def check(found: Row, wanted: Row, rel: float = 1e-9) -> None:
    """Texts are equal, and numbers up to rounding."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), key


# A set, written out ---------------------------------------------------------------------------------------------------


def mean_of(rows: Sequence[Row], key: str) -> float:
    return math.fsum(row[key] for row in rows) / len(rows)


def means(name: str, rows: Sequence[Row]) -> Row:
    keys = ("probability", "paraphrase_probability", "rougeL_recall", "rougeL_f1", "nll")
    keys += ("exact_memorization", "extraction_strength", "repetition", "refusal")
    values = {f"{name}/{key}": mean_of(rows, key) for key in keys if key in rows[0]}
    if "truth_ratio" in rows[0]:
        ratios = [row["truth_ratio"] for row in rows]
        scores = [min(r, 1 / r) if name == "forget" else max(0.0, 1 - r) for r in ratios]
        values[f"{name}/truth_ratio"] = math.fsum(scores) / len(scores)
        if name == "forget" and "paraphrase_probability" in rows[0]:
            parts = [1 - values[f"forget/{key}"] for key in ("extraction_strength", "exact_memorization")]
            # Of the right answer beside the wrong ones: p / (p + p_wrong).
            known = math.fsum(1 / (1 + r) for r in ratios) / len(ratios)
            parts += [1 - values["forget/paraphrase_probability"], 1 - known]
            values["memorization"] = 4 / math.fsum(1 / max(part, 1e-12) for part in parts)
    return values


def area(high: Sequence[float], low: Sequence[float]) -> float:
    """How often a number of the first kind is above one of the second."""
    return sum((a > b) + 0.5 * (a == b) for a in high for b in low) / (len(high) * len(low))


def ks_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Share of all ways to divide the numbers in which the distribution functions are as far apart."""

    def distance(one: Sequence[float], other: Sequence[float]) -> float:
        below = [[sum(x <= at for x in sample) / len(sample) for sample in (one, other)] for at in (*one, *other)]
        return max(abs(a - b) for a, b in below)

    both, seen = [*first, *second], distance(first, second) - 1e-12
    places = range(len(both))
    parts = [set(part) for part in combinations(places, len(first))]
    far = [distance([both[i] for i in part], [both[i] for i in places if i not in part]) >= seen for part in parts]
    return sum(far) / len(far)
