"""The model card of an export: its record as a page that people can read and check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from lit_unlearn.evaluation import results
from lit_unlearn.evaluation.tables import format_table, report_table

Record = Mapping[str, Any]

_LIMITS = """\
What was measured says how far the model's own answers moved away from the deleted rows. It is no proof that nothing can be
recovered: a model that no longer says something may still be brought back to it by a few training steps, by rounding its
weights, or by asking otherwise. `StressBenchmark` tries that (`lit-unlearn test --config eval/stress.yaml --model.lm.model DIR`),
and even what it does not bring back others may."""

_RECIPE = """\
A set's digest in the column "tokens" is the sha256 of a text with one line of JSON for every row, its token ids and its labels:

```python
import hashlib, json

def digest(rows):  # data.examples["forget"] of the data module below, after data.setup("fit")
    lines = (json.dumps([row.input_ids, row.labels]) + "\\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
```"""


def card(record: Record) -> str:
    """The model card, with the front matter that the hub reads.

    What a record does not know is left out: a checkpoint may be without ``versions``, ``data``, ``method``, ``bounds``,
    ``training`` and ``config``.

    Args:
        record: As in an export's ``unlearning.json``.

    Returns:
        Markdown. It never shows a row: only where rows came from, how many there are, and their digests.
    """
    taught = record["kind"] == "taught"
    sections = {
        "": _opening(record),
        "What was taught to what" if taught else "What was deleted from what": _subject(record),
        "How": _method(record),
        "Under which bound": _bounds(record),
        "What was achieved": _achieved(record),
        "Benchmarks": _benchmarks(record),
        "How to check it": _checks(record),
        "Versions": _table(["package", "version"], record.get("versions", {}).items()),
        "Configuration": _config(record),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" if title else body for title, body in sections.items() if body)
    return f"---\n{_front_matter(record)}\n---\n\n{text}\n"


def _front_matter(record: Record) -> str:
    data = ModelCardData(
        base_model=record["model"]["name"] if record["model"]["commit"] else None,  # the hub refuses local paths
        library_name="transformers" if _is_whole(record) else "peft",
        pipeline_tag="text-generation",
        tags=["lit-unlearn"] if record["kind"] == "taught" else ["unlearning", "lit-unlearn"],
    )
    return data.to_yaml().strip()


def _is_whole(record: Record) -> bool:
    return any(name.endswith(".safetensors") and "/" not in name for name in record["files"])


def _opening(record: Record) -> str:
    deleted = record["kind"] == "unlearned"
    lines = [
        f"# Record of a {'deletion' if deleted else 'training'}",
        f"Written by lit-unlearn at {record['created']}, with the files beside it. `unlearning.json` is the same record for "
        "programs.",
    ]
    if deleted and record.get("data"):
        lines.append(_summary(record))
    if record["model"]["adapter"]:
        holds = (
            "the merged model; `adapter` holds the adapter" if _is_whole(record) else "only the adapter, in `adapter`"
        )
        lines.append(f"An adapter was trained. This directory holds {holds}.")
    if record["step"] != record["kept_step"]:
        lines.append(
            f"**This is the model of step {record['step']}, from a checkpoint. The run keeps that of step "
            f"{record['kept_step']}, which is another one.** This one was not measured."
        )
    return "\n\n".join(lines)


def _summary(record: Record) -> str:
    """What a reader who stops here must know."""
    text = f"{record['data']['sets']['forget']['rows']} rows were unlearned from {_code(record['model']['name'])}."
    before, after = (record[time].get("forget/probability") for time in ("before", "after"))
    if before is not None and after is not None:
        text += f" The probability of their answers went from {before:.4g} to {after:.4g}."
    broken = [name for name, one in record["constraints"].items() if one["slack"] is not None and one["slack"] < 0]
    if broken:
        text += f" **A bound on what that may cost IS VIOLATED: {', '.join(broken)}.**"
    elif record["after"]:
        text += " Every bound on what that may cost holds."
    return text


def _subject(record: Record) -> str:
    model = record["model"]
    facts = {
        "base model": _code(model["name"]) if model["name"] else "random weights, from the configuration",
        "architecture": model["architecture"],
        "revision": model["revision"],
        "commit on the hub": model["commit"],
        "adapter": _call("", model["adapter"]) if model["adapter"] else None,
        **{f"sha256 of `{name}`": _code(digest) for name, digest in model["weights"].items()},
    }
    return f"{_table(['', ''], [(name, fact) for name, fact in facts.items() if fact])}\n\n{_sets(record)}"


def _sets(record: Record) -> str:
    data = record.get("data")
    if data is None:
        return "This record does not know the rows: the run had data loaders of its own, or kept no record."
    deleted = record["kind"] == "unlearned"
    forget = "deleted" if deleted else "taught" if data["train_on"] == "all" else "held back"
    lines = []
    for name, one in data["sets"].items():
        role = forget if name == "forget" else "kept" if deleted else "taught"
        counts, file = [one["rows"], one["supervised_tokens"]], _code(one["source"].get("sha256", ""))
        lines.append([f"{name} ({role})", _place(one["source"]), *counts, file, _code(one["sha256"])])
    return _table(["set", "source", "rows", "supervised tokens", "sha256 of the file", "sha256 of the tokens"], lines)


def _place(source: Record) -> str:
    further = [str(source[key]) for key in ("name", "split") if source.get(key)]
    first = [f"first {source['max_rows']} rows"] if source["max_rows"] else []
    return ", ".join([_code(source["path"]), *further, *first])


def _method(record: Record) -> str:
    method, training = record.get("method"), record.get("training")
    lines = []
    if method:
        weight = "" if method["weight"] == 1 else f"{method['weight']:g} × "
        lines.append(f"Minimised on the rows to forget: {weight}{_objective(method)}. {method['paper']}.")
    elif record["kind"] == "taught":
        lines.append("Minimised: the NLL of the rows' answers.")
    if training:
        lines.append(
            f"{_call(training['optimizer'], training['settings'])}, {training['precision']}, {training['strategy']} on "
            f"{training['processes']} process{'es' if training['processes'] > 1 else ''}; seed {training['seed']}."
        )
        if training.get("resumed_at"):
            at = ", ".join(map(str, training["resumed_at"]))
            lines.append(f"The run was stopped and went on after step {at}; the settings are those of its last part.")
    if record["kind"] == "unlearned":
        lines.append(f"{record['steps']} steps were taken; this is the model after step {record['step']}.")
    return "\n\n".join(lines)


def _bounds(record: Record) -> str:
    lines = []
    for name, bound in (record.get("bounds") or {}).items():
        found = record["constraints"][name]
        epsilon = "an epsilon that was not measured" if found["epsilon"] is None else f"{found['epsilon']:.4g}"
        if "relative" in bound and found["reference"] is not None:
            epsilon += f" = {1 + bound['relative']:g} × {found['reference']:.4g}, the value of the model before"
        multiplier = bound["multiplier"]
        settings = {key: value for key, value in multiplier.items() if key != "class"}
        lines.append(
            f"- **{name}**: {_objective(bound)} on the `{bound['stream']}` rows ≤ {epsilon}; λ by "
            f"{_call(multiplier['class'], settings)}, now {found['multiplier_after']:.4g}."
        )
    return "\n".join(lines)


def _achieved(record: Record) -> str:
    if not record.get("after"):
        return _LIMITS if record["kind"] == "unlearned" else ""
    measured = {name: one for name, one in record["constraints"].items() if one["value"] is not None}
    table = f"```text\n{report_table({**record, 'constraints': measured})}\n```"
    return f"{table}\n\n{_LIMITS}" if record["kind"] == "unlearned" else table


def _benchmarks(record: Record) -> str:
    parts = []
    for one in record.get("benchmarks", []):
        rows = ", ".join(f"{stream}: {data.get('rows')} rows" for stream, data in one["data"].items())
        parts.append(
            f"{one['suite']} ({rows}), measured on {_code(one.get('model', {}).get('name') or 'the model of the run')}:"
        )
        parts.append(results.results_table([one], ["this model"], "markdown"))
        parts += [f"{name} is missing: {reason}" for name, reason in one.get("missing", {}).items()]
        parts.append(f"sha256 of the results file, with every row: {_code(one['sha256'])}")
    return "\n\n".join(parts)


def _checks(record: Record) -> str:
    parts = [
        "These files, with `sha256sum`:",
        _table(["file", "sha256"], ((_code(name), _code(digest)) for name, digest in record["files"].items())),
    ]
    if record.get("data"):
        parts.append(f"The files of rows likewise. {_RECIPE}")
    if record.get("config"):
        bounds = "".join(
            f" \\\n  --model.constraints.{name}.epsilon={one['epsilon']!r}"
            for name, one in record["constraints"].items()
            if one["epsilon"] is not None
        )
        parts.append(
            "The values, with the configuration below as `run.yaml`, the rows where it names them and this directory as `DIR`:\n\n"
            f"```bash\nlit-unlearn validate --config run.yaml --model.lm.model=DIR{bounds}\n"
            "lit-unlearn test --config eval/tofu.yaml --model.lm.model=DIR    # or another benchmark\n```"
        )
    return "\n\n".join(parts)


def _config(record: Record) -> str:
    config = _without_nulls(record.get("config"))
    return f"```yaml\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```" if config else ""


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}


def _objective(one: Record) -> str:
    return (
        f"{_call(one['objective'], one['settings'])}, {one['formula']}"
        if one["formula"]
        else _call(one["objective"], one["settings"])
    )


def _call(name: str, settings: Mapping[str, Any]) -> str:
    inner = ", ".join(f"{key}={value}" for key, value in settings.items())
    return _code(f"{name}({inner})" if name else inner)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = list(rows)
    return format_table(lines, head, "markdown") if lines else ""
