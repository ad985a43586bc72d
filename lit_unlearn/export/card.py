"""The model card of an export: its record as a page that people can read and check."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from lit_unlearn.data.selection import RULES
from lit_unlearn.evaluation.tables import format_table, report_table
from lit_unlearn.evaluation.verdict import MAX_FORGET_PROBABILITY, explain_kept, explain_verdict, is_feasible

Record = Mapping[str, Any]

# What a benchmark must be told, beside columns and `template`, to put the prompts of a run.
PROMPT_SETTINGS = (
    *("format", "messages_column", "text_column", "context_column", "chunk_overlap"),
    *("chat", "allow_special_tokens", "mask_padding_ids"),
)

_LIMITS = """\
These values say how far the model's own answers moved away from the deleted examples. They do not prove that nothing can be
recovered: a few training steps, rounding the weights, or another wording of the question may bring an answer back.
`StressBenchmark` tries that (see "How to check this card"); other attacks may succeed where it fails."""

_RECIPE = """\
The digest in the column "sha256 of the tokens" is that of a text with one line of JSON per example, its token ids and labels:

```python
import hashlib, json

def digest(examples):  # data.examples["forget"] of the data module below, after data.setup("fit")
    lines = (json.dumps([example.input_ids, example.labels]) + "\\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
```"""


def render_card(record: Record) -> str:
    """Render the model card, with the front matter that the hub reads.

    What a record does not know is left out: that of a checkpoint may lack ``versions``, ``data``, ``method``, ``bounds``,
    ``training`` and ``config``.

    Args:
        record: As in an export's ``unlearning.json``.

    Returns:
        Markdown. It never shows an example: only where examples came from, how many there are, and their digests.
    """
    sections = {
        "": _render_opening(record),
        "Deleted data and base model" if _is_unlearned(record) else "Training data and base model": _render_subject(
            record
        ),
        "Method": _render_method(record),
        "Constraints": _render_constraints(record),
        "Results of the run": _render_outcome(record),
        "Benchmarks": _render_benchmarks(record),
        "How to check this card": _render_checks(record),
        "Versions": _format_facts(["package", "version"], record.get("versions", {}).items()),
        "Configuration": _render_config(record),
    }
    text = sections.pop("")
    for title, body in sections.items():
        if body:
            text += f"\n\n## {title}\n\n{body}"
    return f"---\n{_render_front_matter(record)}\n---\n\n{text}\n"


def _is_unlearned(record: Record) -> bool:
    # The other kind is "fine-tuned", which records of earlier versions call "taught".
    return bool(record["kind"] == "unlearned")


def _has_full_model(record: Record) -> bool:
    """Return whether the export has a model beside the adapter, which alone is in a folder of its own."""
    return any(name.endswith(".safetensors") and "/" not in name for name in record["files"])


def _render_front_matter(record: Record) -> str:
    # The hub refuses a `base_model` that is a local path.
    is_on_hub = record["model"]["commit"] is not None
    data = ModelCardData(
        base_model=record["model"]["name"] if is_on_hub else None,
        library_name="transformers" if _has_full_model(record) else "peft",
        pipeline_tag="text-generation",
        tags=["unlearning", "lit-unlearn"] if _is_unlearned(record) else ["lit-unlearn"],
    )
    return data.to_yaml().strip()


def _render_opening(record: Record) -> str:
    lines = [
        f"# Record of {'an unlearned' if _is_unlearned(record) else 'a fine-tuned'} model",
        f"Written by lit-unlearn at {record['created']}, with the files beside it. `unlearning.json` is the same record for "
        "programs.",
    ]
    if _is_unlearned(record) and record.get("data"):
        lines.append(_summarize_unlearning(record))
    if record["model"]["adapter"]:
        content = "only the adapter, in `adapter`"
        if _has_full_model(record):
            content = "the merged model; `adapter` holds the adapter"
        lines.append(f"An adapter was trained. This directory holds {content}.")
    if record["step"] != record["kept_step"]:
        lines.append(
            f"**This is the model of step {record['step']}, from a checkpoint. The run keeps another one, that of step "
            f"{record['kept_step']}.** This one was not measured."
        )
    elif _is_unlearned(record) and not record.get("after"):
        lines.append("**This model was not measured**: the run measured other weights, or others were asked for.")
    return "\n\n".join(lines)


def _summarize_unlearning(record: Record) -> str:
    """Return all that a reader needs who stops after the first paragraph."""
    num_examples = record["data"]["sets"]["forget"]["rows"]
    threshold = record.get("max_forget_probability", MAX_FORGET_PROBABILITY)
    explanation = explain_verdict(record["before"], record["after"], threshold)
    text = (
        f"{num_examples} examples were to be unlearned from {_format_code(record['model']['name'])}. **Verdict: "
        f"{explanation}.**"
    )
    if not record["after"]:
        return text

    violated = []
    for name, values in record["constraints"].items():
        if values["value"] is not None and not is_feasible(values["value"], values["epsilon"]):
            violated.append(f"{name}: {values['value']:.4g} > epsilon {_format_epsilon(values)}")
    if violated:
        text += f" **A constraint on the retained data is violated ({'; '.join(violated)}).**"
    elif any(values["value"] is not None for values in record["constraints"].values()):
        text += f" Every constraint on the retained data is satisfied{_summarize_retention(record)}."
    return text


def _summarize_retention(record: Record) -> str:
    """Return what the constraints allowed in terms of answers, since nats per token tell few readers anything."""
    parts = []
    streams = dict.fromkeys(values.get("stream", "retain") for values in record["constraints"].values())
    for stream in streams:
        before, after = record["before"].get(f"{stream}/probability"), record["after"].get(f"{stream}/probability")
        if before is not None and after is not None:
            parts.append(f"the answer probability of the {stream} set went from {before:.4g} to {after:.4g}")
    return f": {'; '.join(parts)}" if parts else ""


def _format_epsilon(values: Record) -> str:
    return "unknown" if values["epsilon"] is None else f"{values['epsilon']:.4g}"


def _render_subject(record: Record) -> str:
    model = record["model"]
    facts = {
        "base model": _format_code(model["name"]) or "random weights, from the configuration",
        "architecture": model["architecture"],
        "revision": model["revision"],
        "commit on the hub": model["commit"],
        "adapter": _format_call("", model["adapter"]) if model["adapter"] else None,
    }
    for name, digest in model["weights"].items():
        facts[f"sha256 of `{name}`"] = _format_code(digest)
    base = model.get("base")
    if base:
        facts["started from"] = (
            f"this adapter, {'merged into' if base['merged'] else 'on'} {_format_code(base['name'])}"
        )
        facts["base revision"], facts["base commit on the hub"] = base["revision"], base["commit"]
        for name, digest in base["weights"].items():
            facts[f"sha256 of the base's `{name}`"] = _format_code(digest)
    # Records of earlier versions do not have it.
    teacher = model.get("teacher")
    if teacher:
        facts["teacher"] = _format_code(teacher["name"])
        facts["teacher's revision"], facts["teacher's commit on the hub"] = teacher["revision"], teacher["commit"]
        for name, digest in teacher["weights"].items():
            facts[f"sha256 of the teacher's `{name}`"] = _format_code(digest)
    # A model made from scratch has no revision, a local one no commit.
    known = [(name, fact) for name, fact in facts.items() if fact]
    return f"{_format_facts(['', ''], known)}\n\n{_render_sets(record)}"


def _render_sets(record: Record) -> str:
    data = record.get("data")
    if data is None:
        return "The data is unknown: the run had data loaders of its own, or its checkpoint has no record."

    rows = []
    for name, values in data["sets"].items():
        if _is_unlearned(record):
            role = "deleted" if name == "forget" else "retained"
        else:
            role = "held out" if name == "forget" and data["train_on"] != "all" else "trained on"
        source = values["source"]
        file_digest = _format_code(source.get("sha256", ""))
        counts = (values["rows"], values["supervised_tokens"])
        rows.append((f"{name} ({role})", _format_source(source), *counts, file_digest, _format_code(values["sha256"])))
    headers = ["set", "source", "examples", "supervised tokens", "sha256 of the file", "sha256 of the tokens"]
    return _format_facts(headers, rows)


def _format_source(source: Record) -> str:
    # A record names its sources only where that was asked for.
    parts = [_format_code(source["path"])] if source.get("path") else ["not named"]
    for key in ("name", "split"):
        if source.get(key):
            parts.append(str(source[key]))
    if source.get("max_rows"):
        parts.append(f"first {source['max_rows']} rows")
    for rule in RULES:
        for column in source.get(rule, ()):
            parts.append(f"`{rule}` on `{column}`")
    if source.get("rows_chosen"):
        parts.append(f"{source['rows_chosen']} of {source['rows_read']} rows chosen")
    return ", ".join(parts)


def _render_method(record: Record) -> str:
    method, training = record.get("method"), record.get("training")
    lines = []
    if method:
        weight = "" if method["weight"] == 1 else f"{method['weight']:g} × "
        lines.append(f"Objective minimised on the forget set: {weight}{_format_objective(method)}. {method['paper']}.")
    elif not _is_unlearned(record):
        lines.append("Objective: the NLL of the answers.")
    if training:
        processes = f"{training['processes']} process{'es' if training['processes'] > 1 else ''}"
        lines.append(
            f"Training: {_format_call(training['optimizer'], training['settings'])}, {training['precision']}, "
            f"{training['strategy']} on {processes}; seed {training['seed']}."
        )
        if training.get("resumed_at"):
            steps = ", ".join(map(str, training["resumed_at"]))
            lines.append(f"The run was resumed after step {steps}; the settings are those of its last part.")
    if _is_unlearned(record):
        lines.append(f"The run took {record['steps']} steps; this is the model after step {record['step']}.")
        if record["step"] == record["kept_step"] and record["after"]:
            keep = (method or {}).get("keep", "best")
            feasible = all(is_feasible(v["value"], v["epsilon"]) for v in record["constraints"].values())
            kept = explain_kept(record["kept_step"], record["steps"], keep, feasible)
            lines.append(f"{kept[0].upper()}{kept[1:]}.")
    return "\n\n".join(lines)


def _render_constraints(record: Record) -> str:
    lines = []
    for name, bound in (record.get("bounds") or {}).items():
        outcome = record["constraints"][name]
        # A run that was stopped before its first step has not measured what a relative epsilon refers to.
        epsilon = "epsilon, which was not measured"
        if outcome["epsilon"] is not None:
            epsilon = f"epsilon {outcome['epsilon']:.4g}"
        if "relative" in bound and outcome["reference"] is not None:
            epsilon += f" = {1 + bound['relative']:g} × {outcome['reference']:.4g}, the value before unlearning"
        settings = dict(bound["multiplier"])
        multiplier = _format_call(settings.pop("class"), settings)
        lines.append(
            f"- **{name}**: {_format_objective(bound)} on the `{bound['stream']}` set ≤ {epsilon}; multiplier λ: "
            f"{multiplier}, {outcome['multiplier_after']:.4g} at the end."
        )
    return "\n".join(lines)


def _render_outcome(record: Record) -> str:
    parts = []
    if record.get("after"):
        # Without validation examples of its stream, a constraint has no line in the table.
        measured = {name: values for name, values in record["constraints"].items() if values["value"] is not None}
        keep = (record.get("method") or {}).get("keep", "best")
        table = report_table({**record, "constraints": measured, "keep": keep})
        parts.append(f"```text\n{table}\n```")
    # Also where nothing was measured: then above all, nothing is proved.
    if _is_unlearned(record):
        parts.append(_LIMITS)
    return "\n\n".join(parts)


def _render_benchmarks(record: Record) -> str:
    parts = []
    for benchmark in record.get("benchmarks", []):
        counts = ", ".join(f"{stream}: {data.get('rows')} rows" for stream, data in benchmark["data"].items())
        model = _format_code(benchmark.get("model", {}).get("name")) or "the model of the run"
        parts.append(f"{benchmark['suite']} ({counts}), measured on {model}:")
        parts.append(_format_facts(["", "this model"], benchmark["aggregate"].items()))
        for name, reason in benchmark.get("missing", {}).items():
            parts.append(f"{name} is missing: {reason}")
        parts.append(f"sha256 of the results file, with every row: {_format_code(benchmark['sha256'])}")
    return "\n\n".join(parts)


def _render_checks(record: Record) -> str:
    files = [(_format_code(name), _format_code(digest)) for name, digest in record["files"].items()]
    parts = ["The files of this directory, with `sha256sum`:", _format_facts(["file", "sha256"], files)]
    if record.get("audit"):
        plan = record["audit"]
        parts.append(
            f"Before the first step, the run named the policy of its audit, {_format_code(plan['policy']['name'])}, with the sha256 "
            f"{_format_code(plan['policy_sha256'])}. `unlearning.json` has its thresholds."
        )
    if record.get("data"):
        parts.append(f"The data files likewise. {_RECIPE}")
    if record.get("config"):
        # Absolute epsilons: measured on this model, a relative one would be another number.
        options = _name_row_files(record, "--data.")
        for name, values in record["constraints"].items():
            if values["epsilon"] is not None:
                options.append(shlex.quote(f"--model.constraints.{name}.epsilon={values['epsilon']!r}"))
        command = " \\\n  ".join(["lit-unlearn validate --config run.yaml --model.lm.model=DIR", *options])
        parts.append(
            "The values of the run, with the configuration below as `run.yaml`, this directory as `DIR`, and the data "
            f"{'as `FORGET` and `RETAIN`' if _has_row_files(record) else 'where the configuration says'}:"
            f"\n\n```bash\n{command}\n```"
        )
    commands = _list_benchmark_commands(record)
    if commands:
        shown = "\n".join(commands)
        parts.append(
            f"Generated answers and attacks, and then the same after relearning and rounding:\n\n```bash\n{shown}\n```"
        )
    return "\n\n".join(parts)


def _has_row_files(record: Record) -> bool:
    """Return whether the rows are in files of the user's own."""
    return (record.get("data") or {}).get("class") == "ForgetRetain"


def _name_row_files(record: Record, prefix: str) -> list[str]:
    # Not the paths: a name may tell what was deleted, and the files may be elsewhere by now.
    if not _has_row_files(record):
        return []
    options = []
    for name, place in (("forget", "FORGET"), ("retain", "RETAIN")):
        source = record["data"]["sets"].get(name, {}).get("source", {})
        rules = {rule: source[rule] for rule in RULES if source.get(rule)}
        options.append(f"{prefix}{name}{'.path' if rules else ''}={place}")
        for rule, columns in rules.items():
            # A record without names has the columns alone, and whoever checks it knows the values.
            values = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "VALUE")
            options.append(shlex.quote(f"{prefix}{name}.{rule}={json.dumps(values, ensure_ascii=False)}"))
    return options


def _list_benchmark_commands(record: Record) -> list[str]:
    """Return the commands that run a benchmark on the very rows that were deleted."""
    data = record.get("data")
    if data is None or not _is_unlearned(record):
        return []
    options: list[str] = []
    if _has_row_files(record):
        suites = ["qa", "stress"]
        options = _name_row_files(record, "--")
        for name in ("question_column", "answer_column"):
            # The others are the benchmark's defaults.
            if data.get(name) not in (None, "question", "answer"):
                options.append(shlex.quote(f"--{name}={data[name]}"))
        options += _list_prompt_options(data)
    elif "forget_split" in data:
        suites = ["tofu", "stress"]
        options = [f"--forget_split={data['forget_split']}", *_list_prompt_options(data)]
    elif "corpus" in data and data.get("forget_set", "forget") == "forget":
        # The benchmark asks for these texts alone, and not for those of MUSE's other forget sets.
        suites, options = ["muse"], [f"--corpus={data['corpus']}"]
    elif "tasks" in data:
        suites, options = ["lume"], [shlex.quote(f"--tasks={json.dumps(data['tasks'])}")]
    else:
        return []
    return [
        " ".join(["lit-unlearn evaluate DIR", f"--suite={suite}", *options, f"--output={suite}.json"])
        for suite in suites
    ]


def _list_prompt_options(data: Record) -> list[str]:
    """Return the options of a benchmark that give it the prompts of the run."""
    options = []
    for name in ("template", *PROMPT_SETTINGS):
        value = data.get(name)
        if name == "chat" and value is not None:
            # The exported tokenizer has it.
            value = {**value, "template": None}
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            options.append(shlex.quote(f"--{name}={text}"))
    return options


def _render_config(record: Record) -> str:
    config = _drop_nulls(record.get("config"))
    return f"```yaml\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```" if config else ""


def _drop_nulls(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    # Hundreds of unset options of the Trainer would hide the dozen that decide.
    return {key: _drop_nulls(entry) for key, entry in value.items() if entry is not None}


def _format_objective(description: Record) -> str:
    call = _format_call(description["objective"], description["settings"])
    return f"{call}, {description['formula']}" if description["formula"] else call


def _format_call(name: str, settings: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items())
    return _format_code(f"{name}({arguments})" if name else arguments)


def _format_code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _format_facts(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = list(rows)
    return format_table(lines, headers, "markdown") if lines else ""
