"""Whether the hub answers, so that a machine without it does not wait."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

from lit_unlearn.errors import MissingFileError

# Seconds that the hub has for its first answer. Its own client tries for a minute.
HUB_TIMEOUT = 5.0


def check_hub(name: str, owner: object = None, argument: str | None = None, cached_file: str | None = None) -> None:
    """Make sure, within seconds, that a hub that does not answer is not waited for.

    If it does not answer, this process goes on as with ``HF_HUB_OFFLINE=1``: with what is in the hub's cache on this machine.

    Args:
        name: Hub name; a local path passes, as does any name with ``HF_HUB_OFFLINE=1``.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument.
        cached_file: A file that the cache has if it has what is asked for; ``None`` if another library will look for it.

    Raises:
        MissingFileError: If the hub does not answer, and the cache has no such file.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(name).exists() or constants.HF_HUB_OFFLINE or _hub_answers():
        return
    place = f"the hub ({constants.ENDPOINT}) does not answer within {HUB_TIMEOUT:g} s"
    if cached_file is not None and not isinstance(try_to_load_from_cache(name, cached_file), str):
        raise MissingFileError(
            f"'{name}' is no local path, {place}, and its cache on this machine has no '{name}': check `{argument}`, or the "
            "connection to the hub.",
            owner=owner,
            argument=argument,
        )
    warnings.warn(
        f"{place}: from here on only its cache on this machine is used, as with HF_HUB_OFFLINE=1.", stacklevel=2
    )
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the other processes of the run
    if "datasets" in sys.modules:
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    answers: list[object] = []

    def ask() -> None:
        # Whatever the answer is, the library will say it better.
        with suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT))

    # In a thread: looking up an address heeds no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return bool(answers)
