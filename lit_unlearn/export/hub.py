"""The Hugging Face hub: check that an export can be uploaded, and upload it."""

from __future__ import annotations

import shlex
from pathlib import Path

from lit_unlearn.errors import OutputError


def find_upload_problem(repository: str) -> str | None:
    """Return why an upload would be refused, so that this is known before any work; ``None`` if nothing is known.

    Args:
        repository: ``name`` or ``owner/name``.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return f"`push_to_hub` must be a repository on the hub, such as 'owner/name', not {repository!r}: {error}"
    if get_token() is None:
        return (
            f"`push_to_hub` ({repository}) needs a token for the Hugging Face hub, and there is none: log in with "
            "`hf auth login`, or set HF_TOKEN. Without `push_to_hub` the export stays on this machine."
        )
    return None


def list_files(folder: Path) -> str:
    """Return the files of a folder with their sizes, a line each: what an upload would publish."""
    lines = []
    total = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            total += size
            lines.append(f"  {size:>15,} bytes  {path.relative_to(folder).as_posix()}")
    return "\n".join([*lines, f"  {total:>15,} bytes in all"])


def upload_export(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an export, in one commit, after a list of what is uploaded.

    Args:
        folder: The export.
        repository: ``name`` or ``owner/name``; created if it does not exist.
        private: Whether only its owner can see it, if it is created now.

    Returns:
        Its address.

    Raises:
        OutputError: If the upload fails, with the command to upload by hand.
    """
    from huggingface_hub import HfApi

    visibility = "private" if private else "public"
    print(f"uploading to '{repository}' on the hub ({visibility} if it is made now):\n{list_files(folder)}")
    try:
        url = HfApi().create_repo(repository, private=private, exist_ok=True)
        # The hub adds the owner to a bare name.
        HfApi().upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Model and its record, by lit-unlearn"
        )
    except Exception as error:
        command = ["hf", "upload", repository, str(folder), *(["--private"] if private else [])]
        # From a lost connection to a full quota, all are the same to the user: the export is there, the upload is not.
        raise OutputError(
            f"the upload to '{repository}' failed: {error}\nThe export is complete at '{folder}'. To upload it by hand: "
            f"{shlex.join(command)}"
        ) from error
    return str(url)
