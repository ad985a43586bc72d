"""Callbacks and plugins of the Trainer: a run's report, pictures, export, attached files, checkpoints, advice and progress.

Only what the Trainer calls belongs here. What works without a Trainer is in ``plotting/`` and ``export/``.
"""

from lit_unlearn.callbacks.advice import RunAdvice
from lit_unlearn.callbacks.attachments import AttachFiles
from lit_unlearn.callbacks.checkpoints import ResumeCheckpoint
from lit_unlearn.callbacks.damage import StopAtDamage
from lit_unlearn.callbacks.defaults import default_callbacks, default_plugins
from lit_unlearn.callbacks.export import ExportModel
from lit_unlearn.callbacks.finished import FinishedRun
from lit_unlearn.callbacks.picture import RunPicture
from lit_unlearn.callbacks.plugins import AtomicCheckpointIO
from lit_unlearn.callbacks.progress import ProgressBar
from lit_unlearn.callbacks.report import Report, RunReport

__all__ = [
    "AtomicCheckpointIO",
    "AttachFiles",
    "ExportModel",
    "FinishedRun",
    "ProgressBar",
    "Report",
    "ResumeCheckpoint",
    "RunAdvice",
    "RunPicture",
    "RunReport",
    "StopAtDamage",
    "default_callbacks",
    "default_plugins",
]
