"""The page of an audit for people who are no engineers: one file, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from lit_unlearn.evaluation.audit import FAIL, NOT_TESTED, PASS, UNDECIDED, Finding
from lit_unlearn.evaluation.audit_policy import Policy
from lit_unlearn.evaluation.measures import MEASURES
from lit_unlearn.evaluation.tables import MISSING

Audit = Mapping[str, Any]

# A sign beside each word: neither colour nor word alone says how it ended.
_SIGNS = {PASS: "✓", FAIL: "✗", UNDECIDED: "?", NOT_TESTED: "–"}
_CLASSES = {PASS: "pass", FAIL: "fail", UNDECIDED: "open", NOT_TESTED: "open"}
_SENTENCES = {
    PASS: "Every requirement of the policy is met, with its whole confidence interval.",
    FAIL: "At least one requirement of the policy is missed, with its whole confidence interval.",
    UNDECIDED: "No requirement is shown to be missed, but at least one could not be decided or not be tested. This is not a pass.",
}
_LIMITS = (
    "An audit says what the attacks that it ran brought back. It does not prove that no attack can. What was not tested is "
    "listed below; other attacks, or the same ones with more effort, may succeed where these fail."
)

# System fonts only: the page asks nothing of any server. Every width is relative, and wide content scrolls in its own box.
# Colours are named once, so that a dark screen and paper only name others; blue and orange differ for colour-blind readers too.
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #444; --line: #ccc; --paper: #fff; --box: #f4f4f4;
  --allowed: #cfe3f1; --pass: #0072B2; --fail: #D55E00; --open: #777; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #bbb; --line: #555; --paper: #16181a; --box: #24272a;
  --allowed: #1f4d6b; --pass: #56B4E9; --fail: #F08A3C; --open: #999; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 50rem; padding: 1rem; color: var(--ink); background: var(--paper); line-height: 1.5;
  font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 0; }
h3::first-letter { text-transform: uppercase; }
p { margin: .5rem 0; }
code { font-family: ui-monospace, Consolas, Menlo, monospace; font-size: .85em; }
pre { overflow-x: auto; background: var(--box); padding: .6rem; border-radius: .3rem; }
.verdict { padding: .8rem 1rem; border-left: .5rem solid; border-radius: .3rem; background: var(--box); }
.verdict strong { font-size: 1.3rem; }
.finding { border: 1px solid var(--line); border-left: .4rem solid; border-radius: .3rem; padding: .7rem .9rem; margin: .8rem 0; }
.pass { border-left-color: var(--pass); } .fail { border-left-color: var(--fail); } .open { border-left-color: var(--open); }
.outcome { font-weight: 700; }
.small { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { width: 30%; min-width: 8rem; font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
svg { width: 100%; max-width: 24rem; height: auto; display: block; margin: .4rem 0; }
svg text { font-size: 11px; fill: var(--soft); }
svg rect { fill: var(--allowed); }
svg line { stroke: var(--ink); stroke-width: 2; } svg line.axis { stroke: var(--open); stroke-width: 1; }
svg circle { fill: var(--ink); }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --line: #bbb; --paper: #fff; --box: #f4f4f4; --allowed: #cfe3f1;
    --pass: #0072B2; --fail: #D55E00; --open: #777; }
  html { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  .finding, .verdict, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
_SETS = {
    "retain": "rows to be kept",
    "holdout": "rows that the model never saw",
    "general": "rows that have nothing to do with it",
}


def render_page(audit: Audit) -> str:
    """Render the page of an audit.

    Args:
        audit: The content of ``audit.json``.

    Returns:
        HTML that can be opened, sent and printed alone. It shows counts and digests of rows, never their text.
    """
    policy = Policy.from_dict(audit["policy"])
    findings = [Finding.from_dict(content) for content in audit["findings"]]
    sections = {
        "What was to be deleted": _render_request(audit),
        "What was done": _render_deletion(audit),
        "Requirements": _render_findings(findings, required=True, confidence=policy.confidence),
        "Advisory measures": _render_findings(findings, required=False, confidence=policy.confidence),
        "What was not tested": _render_gaps(findings),
        "How to read the intervals": _render_reading(policy),
        "How to verify this page": _render_checks(audit, policy),
    }
    body = [_render_opening(audit, findings)]
    for title, content in sections.items():
        if content:
            body.append(f"<h2>{title}</h2>\n{content}")
    # The policy of the browser, too, is told to load nothing.
    security = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{security}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Audit of a deletion: {escape(audit['verdict'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _render_opening(audit: Audit, findings: Sequence[Finding]) -> str:
    verdict = audit["verdict"]
    counts = []
    for outcome in (PASS, FAIL, UNDECIDED, NOT_TESTED):
        number = sum(finding.outcome == outcome and finding.requirement.required for finding in findings)
        if number:
            counts.append(f"{number} {outcome}")
    model = escape(str(audit["model"]["name"]))
    return (
        f"<h1>Audit of a deletion from the language model {model}</h1>\n"
        f'<div class="verdict {_CLASSES[verdict]}"><strong>{_SIGNS[verdict]} {escape(verdict)}</strong>\n'
        f"<p>{_SENTENCES[verdict]} Required measures: {', '.join(counts)}.</p></div>\n"
        f'<p class="small">Written by lit-unlearn {escape(audit["versions"]["lit_unlearn"])} at {escape(audit["created"])}. '
        "<code>audit.json</code>, beside this page, is the same for programs.</p>"
        f"\n<p>{_LIMITS}</p>"
    )


_SAME_ROWS = {
    True: "The forget rows of this audit are those that the record of the deletion names.",
    False: "The forget rows of this audit are <strong>from another file than the one</strong> that the record of the deletion names.",
    None: "Whether the forget rows of this audit are those of the deletion <strong>is not shown</strong>: they are put in another prompt "
    "or order than in the run or are others, and their file is not one that the run read as a whole.",
}


def _render_request(audit: Audit) -> str:
    facts = []
    if audit.get("request"):
        facts.append(("request", escape(audit["request"])))
    forget = audit["data"]["forget"]
    facts.append(("rows to be deleted", str(forget["rows"])))
    if forget.get("sha256"):
        facts.append(("sha256 of their file", _code(forget["sha256"])))
    facts.append(("digest of their texts", _code(forget["texts"])))
    for stream, values in audit["data"].items():
        if stream != "forget":
            facts.append(
                (
                    f"{escape(_SETS.get(stream, stream))}, to compare with",
                    f"{values['rows']}, digest {_code(values['texts'])}",
                )
            )
    text = "<p>The rows are named by digests: a number that anyone who has the rows can compute, and that tells nothing to others.</p>"
    if audit.get("record"):
        text += f"<p>{_SAME_ROWS[audit['record'].get('same_rows')]}</p>"
    return text + _table(facts)


def _render_deletion(audit: Audit) -> str:
    record = audit.get("record")
    if record is None:
        return "<p>There is no record of a deletion beside the model. This audit measures the model only.</p>"
    method = record.get("method")
    facts = [("kind of record", escape(record["kind"]))]
    if method:
        facts.append(("method", _code(method["objective"])))
        facts.append(("paper", escape(method["paper"])))
    for name, bound in (record.get("constraints") or {}).items():
        shown = f"{_number(bound['value'])}, allowed up to {_number(bound['epsilon'])}"
        facts.append((f"loss on the retained data, {escape(name)}", shown))
    facts.append(("model it comes from", escape(str(record["parent"]["name"]))))
    for file, digest in record["parent"]["weights"].items():
        facts.append((f"sha256 of its {escape(file)}", _code(digest)))
    facts.append(("sha256 of the record", _code(record["sha256"])))
    return _table(facts)


def _render_findings(findings: Sequence[Finding], required: bool, confidence: float) -> str:
    parts = []
    for finding in findings:
        if finding.requirement.required == required:
            parts.append(_render_finding(finding, confidence))
    if parts and not required:
        parts.insert(0, "<p>These are reported, and do not decide.</p>")
    return "\n".join(parts)


def _render_finding(finding: Finding, confidence: float) -> str:
    requirement, measure = finding.requirement, MEASURES[finding.requirement.measure]
    lines = [
        f'<div class="finding {_CLASSES[finding.outcome]}"><h3>{escape(measure.title)}</h3>',
        f'<p><span class="outcome">{_SIGNS[finding.outcome]} {escape(finding.outcome)}</span>: {escape(finding.reason)}</p>',
    ]
    if finding.value is not None and finding.low is not None and finding.high is not None:
        basis = f", {finding.sample.basis}" if finding.sample and finding.sample.basis else ""
        rows = f" on {finding.sample.rows} rows" if finding.sample else ""
        lines.append(
            f"<p>Measured: <strong>{_number(finding.value)}</strong>{rows}{escape(basis)}; with {_percent(confidence)} confidence between "
            f"{_number(finding.low)} and {_number(finding.high)}. Allowed: {escape(requirement.describe_threshold())}.</p>"
        )
        lines.append(_draw_interval(finding))
    else:
        lines.append(f"<p>Allowed: {escape(requirement.describe_threshold())}.</p>")
    lines.append(f'<p class="small">{escape(measure.meaning)} (<code>{escape(requirement.measure)}</code>)</p></div>')
    return "\n".join(lines)


class _Axis(NamedTuple):
    """A horizontal axis from ``start`` to ``end``, drawn from x = 10 to x = 290."""

    start: float
    end: float

    def place(self, value: float) -> float:
        inside = min(max(value, self.start), self.end)
        return 10 + 280 * (inside - self.start) / (self.end - self.start)


def _draw_interval(finding: Finding) -> str:
    """Draw an interval above the values that are allowed, as a picture within the page."""
    requirement = finding.requirement
    value, low, high = float(finding.value or 0), float(finding.low or 0), float(finding.high or 0)
    shown = [0.0, low, high]
    shown += [bound for bound in (requirement.at_least, requirement.at_most) if bound is not None]
    start, end = min(shown), max(shown)
    # Most measures are probabilities, shares and areas, and have one axis; on it, one would see nothing of a very small threshold.
    has_common_axis = start >= 0 and 0.1 < end <= 1
    axis = _Axis(0.0, 1.0) if has_common_axis else _Axis(start - 0.1 * (end - start), end + 0.1 * (end - start))
    if axis.start == axis.end:
        axis = _Axis(axis.start - 1, axis.end + 1)

    left = axis.place(axis.start if requirement.at_least is None else requirement.at_least)
    right = axis.place(axis.end if requirement.at_most is None else requirement.at_most)
    low_x, high_x, value_x = axis.place(low), axis.place(high), axis.place(value)
    label = f"interval from {_number(low)} to {_number(high)}; {requirement.describe_threshold()} is allowed"
    shapes = [
        f'<rect x="{left:.1f}" y="8" width="{right - left:.1f}" height="16"/>',
        '<line class="axis" x1="10" y1="24" x2="290" y2="24"/>',
        f'<line x1="{low_x:.1f}" y1="16" x2="{high_x:.1f}" y2="16"/>',
        f'<line x1="{low_x:.1f}" y1="12" x2="{low_x:.1f}" y2="20"/>',
        f'<line x1="{high_x:.1f}" y1="12" x2="{high_x:.1f}" y2="20"/>',
        f'<circle cx="{value_x:.1f}" cy="16" r="3.5"/>',
        f'<text x="10" y="37">{_number(axis.start)}</text>',
        f'<text x="290" y="37" text-anchor="end">{_number(axis.end)}</text>',
        '<text x="150" y="37" text-anchor="middle">blue: allowed</text>',
    ]
    return f'<svg viewBox="0 0 300 42" role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'


def _render_gaps(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        if finding.outcome == NOT_TESTED:
            title = MEASURES[finding.requirement.measure].title
            lines.append(f"<li>{escape(title)}: {escape(finding.reason)}</li>")
    asked = {finding.requirement.measure for finding in findings}
    others = [measure.title for name, measure in MEASURES.items() if name not in asked]
    if others:
        lines.append(f"<li>What the policy does not ask for: {escape('; '.join(others))}.</li>")
    lines.append("<li>Any attack that is not on this page.</li>")
    return f"<ul>\n{chr(10).join(lines)}\n</ul>"


def _render_reading(policy: Policy) -> str:
    return (
        "<p>A value that is measured on some rows would differ a little on other rows of the same kind. The interval says by how "
        f"much: it holds the value for rows like these with {_percent(policy.confidence)} confidence. A requirement passes if the whole "
        "interval is allowed and fails if none of it is; in between it is not decidable, and more rows would narrow it. On fewer than "
        f"{policy.min_rows} rows nothing is decided.</p><p>The audit passes if every required measure passes. That it passes although "
        f"some required value is not allowed has a probability of at most {_percent((1 - policy.confidence) / 2)}, however many measures "
        "there are, as far as the intervals keep their confidence.</p>"
    )


def _render_checks(audit: Audit, policy: Policy) -> str:
    fixed = audit["policy_fixed_before"]
    if fixed:
        text = "The policy was named in the record before the first step of the deletion: its thresholds were not chosen afterwards."
    elif fixed is None:
        text = "No record names a policy: <strong>nothing shows that the thresholds were fixed before the deletion.</strong>"
    else:
        text = "<strong>The record of the deletion names another policy than this one.</strong>"
    facts = [("policy", escape(policy.name)), ("sha256 of the policy", _code(policy.sha256))]
    facts.append(("weights that were measured", _code(audit["model"]["weights"])))
    for file, digest in audit["model"]["files"].items():
        facts.append((f"sha256 of {escape(file)}", _code(digest)))
    command = "lit-unlearn verify AUDIT --model MODEL --forget FORGET --retain RETAIN"
    return (
        f"<p>{text}</p>{_table(facts)}\n<p>With the folder of this page as <code>AUDIT</code>, this computes digests, intervals and "
        "verdict again, and with the rows at hand their digests:</p>"
        f"<pre><code>{escape(command)}</code></pre>"
    )


def _table(facts: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns; the second one is HTML already."""
    rows = [f"<tr><th>{name}</th><td>{content}</td></tr>" for name, content in facts]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _code(text: str | None) -> str:
    return f"<code>{escape(text)}</code>" if text else MISSING


def _number(value: float | None) -> str:
    """Return a number for people: three digits, and no powers of ten for small ones."""
    if value is None:
        return MISSING
    if 0 < abs(value) < 0.0001:
        return "nearly 0"
    return f"{value:.3g}".replace("-", "−")


def _percent(share: float) -> str:
    # The number and its sign stay on one line.
    return f"{100 * share:.4g}\u00a0%"
