"""Ask an LLM judge behind an OpenAI-compatible endpoint, and keep its replies on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm.auto import tqdm

from lit_unlearn.evaluation.endpoint import Endpoint, RequestFailed
from lit_unlearn.utils.io import cache_folder, expand_path, read_json, write_json

RETRIES = 6  # of a request: about 20 seconds of waiting, unless the endpoint names a delay
KEY_VARIABLE = "LIT_UNLEARN_JUDGE_KEY"


class ReplyCache:
    """Replies on disk, one file for each model and prompt, so that a repeated or interrupted run pays for no prompt twice.

    Args:
        model: The judge's name.
        folder: Of the files; ``None`` for ``$LIT_UNLEARN_CACHE/judge``, or else ``~/.cache/lit_unlearn/judge``.
    """

    def __init__(self, model: str, folder: Path | None = None) -> None:
        self.model = model
        self.folder = cache_folder() / "judge" if folder is None else expand_path(folder)

    def read_reply(self, prompt: str) -> str | None:
        """Return the reply to a prompt, or ``None`` if there is none yet."""
        try:
            return str(read_json(self._find_file(prompt))["reply"])
        except (FileNotFoundError, ValueError):
            # A ValueError is a file that was cut short, for example by a crash of the machine: ask again.
            return None

    def write_reply(self, prompt: str, reply: str) -> None:
        """Keep a reply."""
        write_json(self._find_file(prompt), {"model": self.model, "prompt": prompt, "reply": reply}, private=True)

    def _find_file(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()
        return self.folder / f"{digest}.json"


def request_replies(
    prompts: Sequence[str], endpoint: Endpoint, cache: ReplyCache, workers: int
) -> dict[str, str | RequestFailed]:
    """Return the reply to every prompt: from the cache, else from the endpoint.

    Args:
        prompts: Equal ones are sent once.
        endpoint: The judge.
        cache: Gets every reply as soon as it comes.
        workers: Requests at a time.

    Raises:
        EndpointError: If no request can succeed.
    """
    replies: dict[str, str | RequestFailed] = {}
    missing = []
    # Equal prompts once, in order; a set would send them in another order each time.
    for prompt in dict.fromkeys(prompts):
        cached = cache.read_reply(prompt)
        if cached is None:
            missing.append(prompt)
        else:
            replies[prompt] = cached

    def request_reply(prompt: str, retries: int) -> str | RequestFailed:
        try:
            reply = endpoint.complete_prompt(prompt, retries)
        except RequestFailed as failure:
            return failure
        cache.write_reply(prompt, reply)
        return reply

    # The first one goes alone and without retries: a wrong key or address ends here, at once.
    if missing:
        first = request_reply(missing[0], 0)
        if isinstance(first, str):
            replies[missing.pop(0)] = first

    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(request_reply, prompt, RETRIES): prompt for prompt in missing}
        for future in tqdm(as_completed(futures), total=len(futures), desc="judge", unit="reply", leave=False):
            replies[futures[future]] = future.result()
    finally:
        # After an error, prompts that wait in the queue would still be sent, and paid for.
        pool.shutdown(cancel_futures=True)
    return replies
