"""Forget and retain rows: from files or the hub to zipped, resumable batches."""

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.fictional import FictionalAuthors
from lit_unlearn.data.muse import MUSE
from lit_unlearn.data.source import Source
from lit_unlearn.data.tofu import TOFU

__all__ = ["MUSE", "TOFU", "FictionalAuthors", "ForgetRetain", "Source"]
