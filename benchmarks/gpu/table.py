"""The tables of docs/speed.md, from the file that `benchmarks.gpu` writes."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown_blocks import markdown_table
from benchmarks.memory import format_mib
from benchmarks.nll import HEADERS, list_rows
from benchmarks.random_llama import Shape

STEP_HEADER = ["", "s/step", "ratio", "tokens/s", "share of the floor", "peak MiB", "extra MiB", "ratio"]
VARIANT_HEADER = ["variant", "s/step", "tokens/s", "peak MiB", "first losses"]
LABELS = {"plain": "straightforward", "joint": "`passes: joint` (default)"}


def format_results(results: dict[str, Any]) -> str:
    """Return the card and a table of every stage; a stage that is missing or failed is named."""
    machine = results["machine"]
    versions = f"torch {machine['torch']}, CUDA {machine.get('cuda')}, driver {machine.get('driver')}"
    blocks = [f"{machine['device']}, {versions}."]
    for name, format_stage in {
        "tests": _format_tests,
        "step": _format_step,
        "profile": _format_profile,
        "variants": _format_variants,
        "nll": _format_nll,
        "generation": _format_generation,
    }.items():
        stage = results["stages"].get(name, {"is_done": False, "error": "not run"})
        if stage["error"] is not None:
            blocks.append(f"Stage `{name}`: {stage['error']}.")
        # What it had measured before it failed counts as well.
        if set(stage) - {"is_done", "error", "seconds"}:
            blocks.append(format_stage(stage))
    return "\n\n".join(blocks)


def _format_tests(stage: dict[str, Any]) -> str:
    counts = stage["counts"]
    return f"`pytest -m gpu`: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped."


def _format_step(stage: dict[str, Any]) -> str:
    rows = []
    for name, values in stage["formulations"].items():
        memory, ratio = values["memory"], values["memory_ratio"]
        rows.append(
            [
                LABELS[name],
                f"{values['seconds']:.3g}",
                f"{values['time_ratio']:.2f}",
                f"{values['tokens_per_second']:,.0f}",
                f"{100 * values['floor_share']:.0f} %",
                format_mib(memory["peak_bytes"]),
                format_mib(memory["extra_bytes"]),
                "–" if ratio is None else f"{ratio:.2f}",
            ]
        )
    rates = stage["matmul_flops_per_second"]
    what = f"{Shape(**stage['shape'])}, {stage['precision']}, {stage['rows']} + {stage['rows']} examples"
    products = (
        f"matrix products in the same run: head {rates['head'] / 1e12:.1f}, trunk {rates['trunk'] / 1e12:.1f} TFLOP/s"
    )
    return f"{what}; {products}.\n\n{markdown_table(STEP_HEADER, rows)}"


def _format_profile(stage: dict[str, Any]) -> str:
    idle = f"{stage['kernels']:,} kernels in {stage['span_ms']:.1f} ms; none runs {100 * stage['idle_share']:.0f} % of the time"
    rows = []
    for kernel in stage["top"][:8]:
        # Names of templates go on for hundreds of characters, and a bar would end a cell.
        name = kernel["name"][:60].replace("|", "/")
        rows.append([f"`{name}`", str(kernel["calls"]), f"{kernel['ms']:.2f}", f"{100 * kernel['share']:.0f} %"])
    return f"{idle}, at most {stage['largest_gap_ms']:.2f} ms at once.\n\n{markdown_table(['kernel', 'calls', 'ms', 'share'], rows)}"


def _format_variants(stage: dict[str, Any]) -> str:
    rows = []
    for name, values in stage["variants"].items():
        if "error" in values:
            rows.append([name, values["error"].replace("|", "/"), "", "", ""])
            continue
        losses = ", ".join(f"{key} {value:.4g}" for key, value in values["first_losses"].items())
        seconds, rate = f"{values['seconds']:.3g}", f"{values['tokens_per_second']:,.0f}"
        rows.append([name, seconds, rate, format_mib(values["peak_bytes"]), losses])
    return markdown_table(VARIANT_HEADER, rows)


def _format_nll(stage: dict[str, Any]) -> str:
    what = f"NLL of {stage['tokens']} tokens, head {stage['hidden']} × {stage['vocabulary']:,}, {stage['dtype']}"
    missing = "".join(f" Not measured: {name} ({reason})." for name, reason in stage["missing"].items())
    return f"{what}.{missing}\n\n{markdown_table(HEADERS, list_rows(stage))}"


def _format_generation(stage: dict[str, Any]) -> str:
    rates = stage["tokens_per_second"]
    return (
        f"{stage['prompts']} answers of {stage['max_new_tokens']} tokens, {stage['dtype']}: {rates['ours']:,.0f} tokens/s, and "
        f"{rates['plain']:,.0f} with `transformers.generate` in batches of {stage['batch_size']} (ratio of the time "
        f"{stage['time_ratio']:.2f}); {stage['same_texts']} of {stage['prompts']} texts are the same."
    )
