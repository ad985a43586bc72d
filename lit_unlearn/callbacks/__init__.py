"""What people see during a run and take away from it."""

from lit_unlearn.callbacks.advice import RunAdvice
from lit_unlearn.callbacks.checkpoints import ResumeCheckpoint
from lit_unlearn.callbacks.export import ExportModel
from lit_unlearn.callbacks.picture import RunPicture
from lit_unlearn.callbacks.plugins import AtomicCheckpointIO
from lit_unlearn.callbacks.progress import ProgressBar
from lit_unlearn.callbacks.report import RunReport

__all__ = [
    "AtomicCheckpointIO",
    "ExportModel",
    "ProgressBar",
    "ResumeCheckpoint",
    "RunAdvice",
    "RunPicture",
    "RunReport",
]
