"""The Hugging Face hub: whether an export can be uploaded, and its upload."""

from __future__ import annotations

from pathlib import Path


def obstacle(repository: str) -> str | None:
    """Why an upload would be refused, to be said before any work is done; ``None`` if nothing is known to be wrong.

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


def upload(folder: Path, repository: str, private: bool = True) -> str:
    """Uploads an export, in one commit.

    Args:
        folder: The export.
        repository: ``name`` or ``owner/name``; made if there is none.
        private: Whether only its owner can see it, if it is made now.

    Returns:
        Where it is.

    Raises:
        RuntimeError: If it fails, with the command to upload by hand.
    """
    from huggingface_hub import HfApi

    try:
        made = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Model and its record, by lit-unlearn"
        )
    except Exception as error:  # whatever it is, the export is not lost
        raise RuntimeError(
            f"the upload to '{repository}' failed: {error}\nThe export is complete at '{folder}'. To upload it by hand: "
            f"hf upload {repository} {folder}{' --private' if private else ''}"
        ) from error
    return str(made)
