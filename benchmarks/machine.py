"""The machine that numbers were measured on: its hardware, its load, and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str) -> dict[str, Any]:
    """Return hardware, load and versions, without anything that identifies the machine."""
    # Imported late: they take seconds, and formatting stored results needs neither.
    import lightning
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _read_cpu_model(),
        "cores": os.cpu_count(),
        # Windows has no load average.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def _read_cpu_model() -> str:
    # On Linux, `platform.processor` is empty or only an architecture; the kernel knows the model.
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def format_machine(facts: dict[str, Any]) -> str:
    """Format the result of `describe_machine` as two lines of text."""
    hardware = facts["cpu"] if facts["device"] == "cpu" else f"{facts['device']}, {facts['cpu']}"
    packages = f"torch {facts['torch']}, lightning {facts['lightning']}, transformers {facts['transformers']}"
    load = "unknown" if facts["load"] is None else f"{facts['load']:.1f}"
    return f"{hardware}, {facts['threads']} threads, {packages}\nload before: {load} on {facts['cores']} cores"
