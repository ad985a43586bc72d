"""Verify the folder of an export or of an audit: compute again what it claims, and compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source, digest_if_whole
from lit_unlearn.errors import ConfigError, LitUnlearnError, MissingFileError
from lit_unlearn.evaluation.audit import NOT_TESTED, AuditResult, Finding, judge_sample
from lit_unlearn.evaluation.audit_policy import Policy, read_policy
from lit_unlearn.evaluation.measures import Sample
from lit_unlearn.evaluation.qa import QABenchmark
from lit_unlearn.export.audit_files import (
    AUDIT_FILE,
    PAGE_FILE,
    read_question_settings,
    read_record,
    was_fixed_before,
)
from lit_unlearn.export.audit_page import render_page
from lit_unlearn.export.record import RECORD_FILE, digest_examples, digest_export
from lit_unlearn.export.signature import SIGNATURE_SUFFIX, find_signature_problem
from lit_unlearn.models.loading import load_tokenizer
from lit_unlearn.utils.folders import DIGEST_FILE, iterate_files, read_digests
from lit_unlearn.utils.io import file_digest, read_json


class Check(NamedTuple):
    """One comparison.

    Args:
        subject: What was compared.
        matches: Whether it matches; ``None`` if it could not be compared.
        detail: What differs, or why nothing could be compared; empty if it matches.
    """

    subject: str
    matches: bool | None
    detail: str = ""


def verify_folder(
    folder: Path,
    model: str | None = None,
    sets: Mapping[str, str] | None = None,
    public_key: str | None = None,
    policy: str | None = None,
) -> list[Check]:
    """Compute again what a folder claims.

    Args:
        folder: An export, an audit, or any folder with a ``files.sha256`` of this package.
        model: Of an audit: the directory of the model that was audited, to compare its files.
        sets: Files of rows by stream, ``forget`` and ``retain`` for example, to compare their digests.
        public_key: Of an audit: who must have signed it, from `read_public_key`.
        policy: Of an audit: the file of its policy, to compare the thresholds.

    Raises:
        MissingFileError: If there is no such folder.
        ConfigError: If it holds nothing that could be verified.
    """
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder '{folder}': give an export or an audit.")
    sets = sets or {}
    checks = list(_check_files(folder))
    if (folder / RECORD_FILE).is_file():
        checks += _report_damage(RECORD_FILE, _check_record(folder, sets))
    if (folder / AUDIT_FILE).is_file():
        checks += _report_damage(AUDIT_FILE, _check_audit(folder, model, sets))
        if policy is not None:
            checks += _report_damage(AUDIT_FILE, _check_policy(folder, policy))
        checks += _check_signatures(folder, model, public_key)
    if not checks:
        raise ConfigError(
            f"'{folder}' holds nothing to verify: expected {DIGEST_FILE}, {RECORD_FILE} or {AUDIT_FILE}, which exports and "
            "audits have."
        )
    if not (folder / AUDIT_FILE).is_file():
        # Without a word of them, they would seem to have been looked at.
        for subject, given in (("policy", policy), ("signature", public_key)):
            if given is not None:
                checks.append(
                    Check(subject, None, "it is an audit's: give the folder of the audit, and this one as --model")
                )
    return checks


def _report_damage(file: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield checks, and one that fails in place of those that a damaged file leaves no content for."""
    try:
        yield from checks
    except LitUnlearnError:
        # Of something that the user gave.
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        yield Check(f"content of {file}", False, "it cannot be read: it is damaged or was changed")


# Files ----------------------------------------------------------------------------------------------------------------


def _check_files(folder: Path) -> Iterator[Check]:
    listed = read_digests(folder)
    if not listed:
        if (folder / DIGEST_FILE).exists():
            yield Check(DIGEST_FILE, False, "it is no list of this package")
        elif (folder / AUDIT_FILE).is_file() or (folder / RECORD_FILE).is_file():
            yield Check(DIGEST_FILE, False, "it is missing, and with it the digests of all files")
        return
    present = dict(iterate_files(folder))
    for name in sorted({*listed, *present}):
        if name not in present:
            yield Check(f"file {name}", False, "it is listed, and missing")
        elif name not in listed:
            yield Check(f"file {name}", False, "it is not listed: it was added")
        else:
            yield _compare(f"file {name}", file_digest(present[name]) in listed[name], "its sha256 is another one")


def _compare(subject: str, matches: bool, difference: str) -> Check:
    return Check(subject, matches, "" if matches else difference)


# The record -----------------------------------------------------------------------------------------------------------


def _check_record(folder: Path, sets: Mapping[str, str]) -> Iterator[Check]:
    record = read_json(folder / RECORD_FILE)
    difference = _describe_difference(record["files"], digest_export(folder))
    yield _compare("files that the record was made with", not difference, difference)

    recorded_sets = (record.get("data") or {}).get("sets") or {}
    for stream, path in sets.items():
        recorded = recorded_sets.get(stream)
        if recorded is None:
            yield Check(f"{stream} rows of the record", None, "the record has no such set")
            continue
        yield _check_file_digest(f"file of the {stream} rows of the record", digest_if_whole(recorded["source"]), path)
    if recorded_sets and {"forget", "retain"} <= sets.keys():
        yield from _check_tokens(folder, record, sets)


def _check_file_digest(subject: str, recorded: str | None, path: str) -> Check:
    digest = Source(path).digest()
    if recorded is None or digest is None:
        return Check(subject, None, "no sha256 of a file is known")
    return _compare(subject, digest == recorded, f"recorded {recorded}, and '{Path(path).name}' has {digest}")


def _check_tokens(folder: Path, record: Mapping[str, Any], sets: Mapping[str, str]) -> Iterator[Check]:
    """Tokenise the rows as the run did, and compare the digests of tokens and labels."""
    data = record["data"]
    larger = [
        stream for stream in ("forget", "retain") if _is_larger_file(sets[stream], data["sets"][stream]["source"])
    ]
    if larger:
        detail = f"the run chose some rows of the {' and the '.join(larger)} file: give them in a file of their own"
        yield Check("tokens of the record's rows", None, detail)
        return
    settings = read_question_settings(dict(record))
    for name in ("supervise", "span_column"):
        if name in data:
            settings[name] = data[name]
    try:
        module = ForgetRetain(sets["forget"], sets["retain"], tokenizer=str(folder), **settings)
        module.setup("fit")
    except LitUnlearnError as error:
        yield Check(
            "tokens of the record's rows",
            None,
            f"they cannot be read in the way of the record ({type(error).__name__})",
        )
        return
    for stream in ("forget", "retain"):
        recorded = data["sets"][stream]
        if recorded.get("dropped_duplicates"):
            yield Check(f"tokens of the {stream} rows", None, "the run left duplicates out")
            continue
        digest = digest_examples(module.examples[stream])
        yield _compare(f"tokens of the {stream} rows", digest == recorded["sha256"], "other rows, or in other prompts")


def _is_larger_file(path: str, source: Mapping[str, Any]) -> bool:
    """Return whether a file is the one of which a run read some rows; its record does not say which, as that may name a person."""
    return digest_if_whole(source) is None and source.get("sha256") == Source(path).digest() is not None


# The audit ------------------------------------------------------------------------------------------------------------


def _check_audit(folder: Path, model: str | None, sets: Mapping[str, str]) -> Iterator[Check]:
    audit = read_json(folder / AUDIT_FILE)
    try:
        policy = Policy.from_dict(audit["policy"])
        findings = [Finding.from_dict(content) for content in audit["findings"]]
    except ConfigError:
        yield Check(f"content of {AUDIT_FILE}", False, "it has a policy that no audit can have")
        return
    requirements = tuple(finding.requirement for finding in findings)
    yield _compare("requirements of the audit", requirements == policy.requirements, "they are not those of its policy")
    for finding in findings:
        if finding.sample is not None:
            yield _check_finding(finding, finding.sample, policy)
        elif finding.outcome != NOT_TESTED:
            yield Check(
                f"outcome of {finding.requirement.measure}", False, "it has no numbers, and is not 'not tested'"
            )
    verdict = AuditResult(policy, tuple(findings)).verdict
    yield _compare("verdict of the audit", verdict == audit["verdict"], f"the outcomes give '{verdict}'")
    if (folder / PAGE_FILE).is_file():
        page = (folder / PAGE_FILE).read_text(encoding="utf-8")
        yield _compare(PAGE_FILE, page == render_page(audit), f"it is not the page of {AUDIT_FILE}")

    if model is not None:
        yield from _check_model(audit, model)
    for stream, path in sets.items():
        described = audit["data"].get(stream)
        if described is None:
            yield Check(f"{stream} rows of the audit", None, "the audit has no such set")
            continue
        yield _check_file_digest(f"file of the {stream} rows of the audit", described.get("sha256"), path)
    if model is not None and "forget" in sets and "retain" in sets:
        yield from _check_texts(audit, model, sets)


def _check_policy(folder: Path, policy: str) -> Iterator[Check]:
    is_same = Policy.from_dict(read_json(folder / AUDIT_FILE)["policy"]) == read_policy(policy)
    yield _compare("policy of the audit", is_same, f"'{Path(policy).name}' is another one")


def _check_finding(finding: Finding, sample: Sample, policy: Policy) -> Check:
    """Compute interval and outcome again from the numbers of the rows."""
    again = judge_sample(finding.requirement, sample, policy)
    pairs = ((again.value, finding.value), (again.low, finding.low), (again.high, finding.high))
    # Another version of numpy may add up in another order.
    are_close = all(_are_close(computed, claimed) for computed, claimed in pairs)
    matches = are_close and again.outcome == finding.outcome
    detail = f"the numbers of its rows give '{again.outcome}', {again.value} in [{again.low}, {again.high}]"
    return _compare(f"outcome of {finding.requirement.measure}", matches, detail)


def _are_close(computed: float | None, claimed: float | None) -> bool:
    if computed is None or claimed is None:
        return computed is claimed
    return math.isclose(computed, claimed, rel_tol=1e-9, abs_tol=1e-12)


def _check_model(audit: Mapping[str, Any], model: str) -> Iterator[Check]:
    files = audit["model"]["files"]
    if not files or not Path(model).is_dir():
        yield Check("files of the audited model", None, "no digests of files are known")
    else:
        difference = _describe_difference(files, digest_export(Path(model)))
        yield _compare("files of the audited model", not difference, difference)
    record = audit.get("record")
    if record is not None:
        file = Path(model) / RECORD_FILE
        digest = file_digest(file) if file.is_file() else None
        yield _compare("record of the audited model", digest == record["sha256"], "it is another one, or missing")
    model_record = read_record(model)
    fixed_before = was_fixed_before(model_record, audit["policy"]["sha256"])
    is_claimed = audit["policy_fixed_before"]
    detail = f"the audit says {is_claimed}, and the model's record {fixed_before}"
    yield _compare("whether the policy was fixed before the run", is_claimed == fixed_before, detail)
    named = (model_record or {}).get("audit")
    if named is not None:
        # Its thresholds and not the digest alone, which says nothing of what stands beside it in an audit that was changed.
        fixed = Policy.from_dict({**named["policy"], "sha256": named["policy_sha256"]})
        is_same = fixed == Policy.from_dict(audit["policy"])
        yield _compare("policy that the record names", is_same, "the audit has another policy")


def _check_signatures(folder: Path, model: str | None, public_key: str | None) -> Iterator[Check]:
    signed = {AUDIT_FILE: folder / AUDIT_FILE}
    if model is not None:
        signed[RECORD_FILE] = Path(model) / RECORD_FILE
    for name, file in signed.items():
        signature = folder / f"{name}{SIGNATURE_SUFFIX}"
        if signature.is_file() and file.is_file():
            problem = find_signature_problem(file, signature, public_key)
            yield _compare(f"signature of {name}", problem is None, problem or "")
            if problem is None and public_key is None:
                signer = read_json(signature)["public_key"]
                yield Check(f"signer of {name}", None, f"it is {signer}: give --public_key to say who it must be")
        elif public_key is not None and name == AUDIT_FILE:
            yield Check(f"signature of {name}", False, "it is not signed")


def _check_texts(audit: Mapping[str, Any], model: str, sets: Mapping[str, str]) -> Iterator[Check]:
    """Read the rows as the audit did, and compare the digests of texts and tokens."""
    settings: dict[str, Any] = {**audit["settings"], **sets}
    if settings.get("chat") is not None:
        settings |= read_question_settings({"data": {"chat": settings["chat"]}})
    try:
        benchmark = QABenchmark(**settings, max_new_tokens=audit["policy"]["max_new_tokens"])
        described = benchmark.describe_data(load_tokenizer(model))
    except LitUnlearnError as error:
        yield Check("rows of the audit", None, f"they cannot be read in the way of the audit ({type(error).__name__})")
        return
    for stream, values in described.items():
        claimed = audit["data"].get(stream, {})
        for key in ("rows", "texts", "tokens"):
            yield _compare(f"{key} of the {stream} set", values[key] == claimed.get(key), "the audit had other ones")


def _describe_difference(recorded: Mapping[str, str], present: Mapping[str, str]) -> str:
    names = [name for name in sorted({*recorded, *present}) if recorded.get(name) != present.get(name)]
    return f"other files than recorded: {', '.join(names)}" if names else ""
