"""A list of attacks on a model and on the retain-only model: curves, resuming, what cannot run, and what is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.rows import FORGET, RETAIN, loaded, taught, write

from lit_unlearn import (
    FewShot,
    LanguageModel,
    OtherQuestions,
    Prefix,
    QABenchmark,
    Relearn,
    RepeatedSampling,
    Rounding,
    SeveralTurns,
    StressBenchmark,
    cli,
)
from lit_unlearn.cli.attack import read_config
from lit_unlearn.data.encoding import encode
from lit_unlearn.errors import ModelError
from lit_unlearn.evaluation.attack_run import NO_ATTACK, VALUES, Outcome, attack_table, build_report, run_attacks
from lit_unlearn.evaluation.attacks.rounding import round_as_gguf, round_weights
from lit_unlearn.plotting import draw_attacks

CURVE = Relearn(rows=2, steps=4, lr=3e-3, seed=1, curve=(1, 2))
ROWS = [{**row, "paraphrased_question": f"Say: {row['question']}"} for row in FORGET]


def benchmark(forget: Any = None, **settings: Any) -> QABenchmark:
    return QABenchmark(forget or ROWS, RETAIN, **{"max_new_tokens": 2, "wrong_column": "", **settings})


@pytest.fixture(scope="module")
def lm(tokenizer_dir: str) -> LanguageModel:
    """Knows a part of the rows."""
    return loaded(taught(tokenizer_dir, 20), torch.float32)


@pytest.fixture(scope="module")
def retain_only(tokenizer_dir: str) -> LanguageModel:
    return loaded(taught(tokenizer_dir, 0, 3), torch.float32)


def weights_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.state_dict().items()}


# Relearning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 2)], ids=str
)
def test_the_points_of_a_curve_are_runs_of_that_many_steps(dtype, rank, lm):
    model = LanguageModel.wrap(copy.deepcopy(lm.model).to(dtype), lm.tokenizer)
    before, random = weights_of(model), torch.random.get_rng_state()
    examples = [encode(row["question"], row["answer"], lm.tokenizer) for row in FORGET[:2]]
    attack = Relearn(2, 4, 3e-3, lora_rank=rank, curve=(1, 3))
    points = {step: weights_of(changed) for step, changed in attack.change_model(model, examples)}
    assert list(points) == [1, 3, 4]
    for step, found in points.items():
        ((_, alone),) = Relearn(2, step, 3e-3, lora_rank=rank).change_model(model, examples)
        assert all(torch.equal(value, found[name]) for name, value in weights_of(alone).items())
        assert next(iter(found.values())).dtype == dtype
    assert any(not torch.equal(points[3][name], value) for name, value in points[4].items())
    # The original is left as it was, and so are the random numbers around it.
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_lora_trains_the_adapter_alone(lm):
    examples = [encode(FORGET[0]["question"], FORGET[0]["answer"], lm.tokenizer)]
    ((_, changed),) = Relearn(1, 3, 1e-2, lora_rank=2).change_model(lm, examples)
    base = {name.replace("base_layer.", ""): value for name, value in changed.causal_lm.state_dict().items()}
    assert all(torch.equal(value, base[name]) for name, value in lm.causal_lm.state_dict().items())
    assert all("lora" in name for name, weight in changed.model.named_parameters() if weight.requires_grad)
    assert changed.fingerprint() != lm.fingerprint()


def test_rows_of_a_set_or_of_a_file(lm, tmp_path):
    text = write(tmp_path / "general.jsonl", [{"text": "The sea is deep."}, {"text": "A boat is small."}])
    asked = write(tmp_path / "asked.jsonl", RETAIN[:2])
    found = {}
    for source in ("forget", "retain", text, asked):
        found[source] = Relearn(2, 1, 1.0, source=source).find_examples(benchmark(), lm.tokenizer)
    assert [len(known) for _, known in found.values()] == [2, 0, 0, 0]
    decoded = [lm.tokenizer.decode(example.input_ids) for example in found[text][0]]
    assert [line.strip("</s>").strip() for line in decoded] == ["The sea is deep.", "A boat is small."]
    assert found[asked][0] == [encode(row["question"], row["answer"], lm.tokenizer) for row in RETAIN[:2]]
    # Also where the sets' own columns have other names.
    renamed = [{"q": row["question"], "a": row["answer"]} for row in FORGET]
    other = QABenchmark(renamed, renamed, question_column="q", answer_column="a")
    for source in (text, asked):
        examples, _ = Relearn(2, 1, 1.0, source=source).find_examples(other, lm.tokenizer)
        assert examples == found[source][0]
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        Relearn(1, 1, 1.0, source="no.jsonl").find_examples(benchmark(), lm.tokenizer)
    assert Relearn(0.4, 1, 1.0).choose(5) == Relearn(2, 1, 1.0).choose(5)
    with pytest.raises(ValueError, match=r"`rows` is 6, .* 5 rows in 'forget'"):
        Relearn(6, 1, 1.0).choose(5)


@pytest.mark.parametrize("curve", [(4,), (2, 1), (0, 1), (1, 1)])
def test_a_curve_ascends_below_the_last_step(curve):
    with pytest.raises(ValueError, match=r"`curve` .*`steps` \(4\)"):
        Relearn(1, 4, 1.0, curve=curve)


# Other attacks --------------------------------------------------------------------------------------------------------


def test_gguf_rounds_blocks_of_32():
    pytest.importorskip("gguf", reason="the values of GGUF files need the package gguf")
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for bits, steps in ((8, 127), (4, 8)):
        rounded = round_as_gguf(weight, bits)
        blocks = weight.view(3, 2, 32).abs().amax(dim=-1, keepdim=True).expand(3, 2, 32).reshape(3, 64)
        # The scale is stored in half precision, and the 4-bit values reach further on one side.
        assert ((rounded - weight).abs() <= 1.01 * blocks / steps).all()
        assert all(len(row.unique()) <= 2**bits for row in rounded.view(6, 32))
    narrow = torch.nn.Sequential(torch.nn.Linear(20, 4))
    narrow.get_output_embeddings = lambda: None
    assert round_as_gguf(narrow[0].weight, 4) is narrow[0].weight
    with pytest.raises(ModelError, match="nothing would be rounded"):
        round_weights(narrow, 4, round_as_gguf)


def test_another_language_has_answers_of_its_own(lm):
    rows = [{**row, "frage": f"Und {row['question']}", "antwort": f"Ja, {row['answer']}"} for row in FORGET]
    settings = {"wrong_column": "perturbed_answer", "paraphrase_column": "perturbed_answer"}
    changed = OtherQuestions("frage", "antwort").change_benchmark(benchmark(rows, **settings)).run(lm)
    renamed = [{"question": row["frage"], "answer": row["antwort"]} for row in rows]
    assert changed.examples == {"forget": benchmark(renamed).run(lm).examples["forget"]}


# The list -------------------------------------------------------------------------------------------------------------

ATTACKS = {
    "relearn": CURVE,
    "two bits": Rounding(2),
    "few-shot": FewShot(1),
    "prefix": Prefix(1),
    "turns": SeveralTurns(1),
    "paraphrased": OtherQuestions(),
    "sampled": RepeatedSampling(2),
}


@pytest.fixture(scope="module")
def outcomes(lm: LanguageModel, retain_only: LanguageModel) -> dict[str, Any]:
    """What every attack brings back from both models."""
    return {
        "model": run_attacks(lm, ATTACKS, benchmark()),
        "retain_only": run_attacks(retain_only, ATTACKS, benchmark()),
    }


def test_every_attack_is_the_benchmark_on_what_it_changes(outcomes, lm):
    found = outcomes["model"]
    assert list(found) == [NO_ATTACK, *ATTACKS]
    stressed = StressBenchmark(benchmark(), Relearn(2, 4, 3e-3, 1), bits=[2], paraphrased=True).run(lm).aggregate
    wanted = {
        "relearn": ("relearn/forget_others", 4, 3),
        "two bits": ("2bit/forget", 2, 5),
        "paraphrased": ("paraphrased/forget", 1, 5),
        NO_ATTACK: ("forget", 0, 5),
    }
    for label, (stream, effort, rows) in wanted.items():
        point = found[label].points[-1]
        assert (point["effort"], point["rows"]) == (effort, rows)
        for value in ("probability", "rougeL_recall", "extraction_strength"):
            assert point[value] == pytest.approx(stressed[f"{stream}/{value}"], rel=1e-6), (label, value)
    assert [point["effort"] for point in found["relearn"].points] == [0, 1, 2, 4]
    # The curve begins with the rows that it goes on with.
    assert found["relearn"].points[0]["rows"] == 3
    shot = benchmark().with_attack(FewShot(1, template="Question: {question}\nAnswer: {answer}")).run(lm)
    assert found["few-shot"].points[0]["probability"] == shot.aggregate["forget/probability"]
    leaked = RepeatedSampling(2).change_benchmark(benchmark()).run(lm).aggregate
    assert [point["rougeL_recall"] for point in found["sampled"].points] == [
        leaked["leak@1/rougeL_recall"],
        leaked["leak@2/rougeL_recall"],
    ]
    assert found["sampled"].points[0]["probability"] is None
    assert all(0 <= point[value] <= 1 for value in VALUES for point in found["prefix"].points)


def test_the_retain_only_model_stands_beside_it_and_no_text_anywhere(outcomes, tmp_path):
    report = build_report(ATTACKS, outcomes, models={})
    entry = report["attacks"]["relearn"]
    assert entry["settings"]["lr"] == 3e-3
    curves = [[point["probability"] for point in entry[role]["points"]] for role in ("model", "retain_only")]
    table = attack_table(report, "probability", "csv")
    lines = [line.split(",") for line in table.splitlines() if line.startswith("relearn")]
    assert [line[1] for line in lines] == ["0 steps", "1 steps", "2 steps", "4 steps"]
    for line, leaked, reference in zip(lines, *curves, strict=True):
        assert [float(cell) for cell in line[2:]] == pytest.approx([leaked, reference, leaked - reference], rel=1e-2)
    # What has no probability is shown by another measure, and not by nothing.
    sampled = [line.split(",") for line in table.splitlines() if line.startswith("sampled,")]
    assert float(sampled[0][2]) == pytest.approx(
        outcomes["model"]["sampled"].points[0]["rougeL_recall"], rel=1e-2, abs=1e-6
    )
    assert "of sampled: ROUGE-L recall" in table
    alone = build_report(ATTACKS, {"model": outcomes["model"]})
    assert attack_table(alone, "probability", "csv").splitlines()[1].endswith(",–,–")

    draw_attacks(report, "probability", tmp_path / "a.svg", tmp_path / "a.png")
    draw_attacks(alone, "rougeL_recall", tmp_path / "alone.png")
    written = json.dumps(report) + table + (tmp_path / "a.svg").read_text("utf-8")
    for row in ROWS:
        # An answer of one letter is in every text.
        assert not any(text in written for text in row.values() if isinstance(text, str) and len(text) > 5)
    assert (tmp_path / "alone.png").stat().st_size > 5000


def test_an_interrupted_list_goes_on_to_the_same_report(lm, tmp_path, monkeypatch):
    attacks = {"relearn": Relearn(2, 1, 3e-3), "two bits": Rounding(2), "prefix": Prefix(1)}
    wanted = build_report(attacks, {"model": run_attacks(lm, attacks, benchmark(), tmp_path / "whole")})

    def stop(label: str, outcome: Outcome) -> None:
        if label == "two bits":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attacks(lm, attacks, benchmark(), tmp_path / "partial", stop)
    # What is finished must not run again.
    monkeypatch.setattr(Relearn, "change_model", None)
    monkeypatch.setattr(Rounding, "change_model", None)
    found = build_report(attacks, {"model": run_attacks(lm, attacks, benchmark(), tmp_path / "partial")})
    assert json.dumps(found) == json.dumps(wanted)
    # Another setting is another attack, whatever its name.
    monkeypatch.undo()
    found = run_attacks(lm, {"two bits": Rounding(3)}, benchmark(), tmp_path / "partial")
    assert [point["effort"] for point in found["two bits"].points] == [3]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "no reason given (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory (OutOfMemoryError)"),
    ],
    ids=["host", "device"],
)
def test_an_attack_that_lacks_memory_is_not_tested(error, reason, lm, tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(Rounding, "change_model", fail)
    attacks = {"two bits": Rounding(2), "prefix": Prefix(1)}
    found = run_attacks(lm, attacks, benchmark(), tmp_path / "partial")
    assert found["two bits"].not_tested == reason
    assert found["prefix"].not_tested is None
    report = build_report(attacks, {"model": found})
    assert report["attacks"]["two bits"]["model"] == {"not_tested": reason}
    table = attack_table(report)
    assert f"two bits: not tested: {reason}" in table
    assert [line.split()[2:4] for line in table.splitlines() if line.startswith("two bits  ")] == [["not", "tested"]]
    draw_attacks(report, "probability", tmp_path / "a.svg")
    # It may run the next time.
    monkeypatch.undo()
    assert run_attacks(lm, attacks, benchmark(), tmp_path / "partial")["two bits"].not_tested is None


def test_what_cannot_run_says_why(lm, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    quantised = LanguageModel.wrap(copy.deepcopy(lm.model), lm.tokenizer)
    quantised.model.is_quantized = True
    attacks = {
        "package": Rounding(4, "gguf"),
        "column": OtherQuestions("frage"),
        "all rows": Relearn(5, 1, 1e-3),
        "more rows": Relearn(6, 1, 1e-3),
        "shots": FewShot(9),
        "integers": Rounding(4),
        "long": FewShot(1),
    }
    found = run_attacks(quantised, attacks, benchmark(max_length=40))
    reasons = {label: str(outcome.not_tested) for label, outcome in found.items() if outcome.not_tested}
    assert reasons.keys() == set(attacks)
    expected = (
        "pip install gguf",
        "'frage'",
        "every forget row",
        "`rows` is 6",
        "`shots` is 9",
        "quantised",
        "max_length",
    )
    for reason, part in zip(reasons.values(), expected, strict=True):
        assert part in reason


# The command ----------------------------------------------------------------------------------------------------------


def test_the_packaged_lists_are_read():
    import yaml

    for name in ("default", "short"):
        file = next(folder for folder in cli.CONFIGS if folder.is_dir()) / "attack" / f"{name}.yaml"
        attacks, _, value = read_config(yaml.safe_load(file.read_text("utf-8")))
        assert len(attacks) >= 8
        assert value in VALUES
    assert attacks["relearn forget rows"] == Relearn(0.5, 20, 1e-3, curve=(1, 2, 5, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"atacks": {}}, "'atacks': did you mean 'attacks'"),
        ({"attacks": {}}, "`attacks` must have an entry"),
        ({"attacks": {"x": {"attack": "roundin", "bits": 4}}}, "'roundin'; did you mean 'rounding'"),
        ({"attacks": {"x": {"attack": "rounding", "bits": 3, "backend": "gguf"}}}, r"'x' .*got 'gguf' and \[3\]"),
        ({"attacks": {"x": {"attack": "rounding", "bit": 3}}}, "'x' .*'bit'"),
        ({"attacks": {"rounding": {"bits": 4}}, "value": "rouge"}, "'rouge': there are .*'rougeL_recall'"),
        ({"attacks": {"rounding": {"bits": 4}}, "max_new_tokens": 0}, "`max_new_tokens` .* 0"),
        ({"attacks": {NO_ATTACK: {"attack": "prefix"}}}, "another name"),
    ],
    ids=str,
)
def test_what_a_list_cannot_have(content, message):
    with pytest.raises(ValueError, match=message):
        read_config(content)


def test_the_command(in_tmp, tokenizer_dir, capsys):
    files = [f"--forget={write(in_tmp / 'forget.jsonl', FORGET)}", f"--retain={write(in_tmp / 'retain.jsonl', RETAIN)}"]
    config = (
        "{max_new_tokens: 2, attacks: {few-shot: {attack: few_shot, shots: 1}, 4 bits: {attack: rounding, bits: 4}}}"
    )
    models = [taught(tokenizer_dir, 20), f"--retain_only={taught(tokenizer_dir, 0, 3)}"]
    cli.main(["attack", *models, *files, "--output=out", f"--config={config}"])
    captured = capsys.readouterr()
    assert "4 bits" in captured.out
    assert "4 bits: 0." in captured.out
    assert "2 tokens are generated" in captured.err
    report = json.loads(Path("out/attack.json").read_text("utf-8"))
    assert set(report["models"]) == {"model", "retain_only"}
    assert report["data"]["forget"]["rows"] == len(FORGET)
    assert report["attacks"]["4 bits"]["retain_only"]["points"][0]["effort"] == 4
    assert Path("out/attack.png").stat().st_size > 5000
    assert not list(Path().glob("*.partial"))
    # The curve beside the model's would be its own.
    with pytest.raises(SystemExit) as end:
        cli.main(["attack", models[0], *files, f"--config={config}", "--output=same", f"--retain_only={models[0]}"])
    assert end.value.code == 2
    assert "same weights" in capsys.readouterr().err
    assert not Path("same").exists()
    # A folder without a model is refused before the first model is attacked.
    with pytest.raises(SystemExit) as end:
        cli.main(["attack", models[0], *files, f"--config={config}", "--output=same", f"--retain_only={in_tmp}"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "no complete model directory" in captured.err
    assert "attacking" not in captured.out
