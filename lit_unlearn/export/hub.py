"""The Hugging Face hub: check that an export can be uploaded, and upload it."""

from __future__ import annotations

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


def upload_export(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an export, in one commit.

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

    try:
        url = HfApi().create_repo(repository, private=private, exist_ok=True)
        # The hub adds the owner to a bare name.
        HfApi().upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Model and its record, by lit-unlearn"
        )
    except Exception as error:
        # From a lost connection to a full quota, all are the same to the user: the export is there, the upload is not.
        raise OutputError(
            f"the upload to '{repository}' failed: {error}\nThe export is complete at '{folder}'. To upload it by hand: "
            f"hf upload {repository} {folder}{' --private' if private else ''}"
        ) from error
    return str(url)
