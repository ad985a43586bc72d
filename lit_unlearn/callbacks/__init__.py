"""What people see during a run and take away from it."""

from lit_unlearn.callbacks.checkpoints import AtomicCheckpointIO, ExportModel, ResumeCheckpoint
from lit_unlearn.callbacks.report import ProgressBar, RunPicture, RunReport

__all__ = ["AtomicCheckpointIO", "ExportModel", "ProgressBar", "ResumeCheckpoint", "RunPicture", "RunReport"]
