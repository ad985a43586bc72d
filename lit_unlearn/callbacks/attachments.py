"""Files of a run that go to the loggers which take files, and those with text of rows, which do not."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.callbacks.report import RunReport
from lit_unlearn.plotting.run_log import PICTURE_FILE, REPORT_FILE
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.utils.redaction import redact_secrets
from lit_unlearn.utils.validation import check_choice

AttachedFiles = Literal["numbers", "all", "none"]


class AttachFiles(Callback):
    """Attach the report and the pictures of a run, when it ends, to its loggers that take files.

    These are Weights & Biases and MLflow; TensorBoard gets the pictures. Other loggers get nothing. A logger may send what it gets
    to a server, so that by default no text of a row is attached.

    Args:
        files: ``"numbers"`` for the pictures ``dual`` and ``trajectory``, and for ``report.json`` unless it has text of a row
            (the data's ``show_example``); ``"all"`` for every file that `RunReport`, `RunPicture` and the benchmark wrote, with
            questions and answers of the forget set; ``"none"`` for nothing.

    Raises:
        ConfigError: If ``files`` is none of these.
    """

    def __init__(self, files: AttachedFiles = "numbers") -> None:
        check_choice(get_args(AttachedFiles), self, files=files)
        self.files = files

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach the files. A logger that cannot take them ends no run."""
        if self.files == "none" or not isinstance(pl_module, LitLanguageModel) or is_dry_run(trainer):
            return
        folder = find_run_folder(trainer)  # every process asks for it
        if not trainer.is_global_zero:
            return
        numbers, texts = _find_files(trainer, pl_module, folder)
        attached = numbers if self.files == "numbers" else [*numbers, *texts]
        for logger in trainer.loggers:
            try:
                names = _attach_to(logger, attached, trainer.global_step)
            except Exception as error:
                # Whatever it is, as a server that cannot be reached: the files are in the run's folder.
                reason = redact_secrets(str(error))
                rank_zero_warn(
                    f"{type(logger).__name__} did not take the files of the run ({reason}); they are in {folder}."
                )
                continue
            if names:
                rank_zero_info(f"attached to {type(logger).__name__}: {', '.join(names)}")


def _find_files(trainer: L.Trainer, module: LitLanguageModel, folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that a run wrote: those with numbers alone, and those that may have text of rows."""
    numbers = [folder / "dual.png", folder / "trajectory.png"]
    texts = [folder / "tokens.png", folder / PICTURE_FILE]
    reporter = next((c for c in trainer.callbacks if isinstance(c, RunReport)), None)  # type: ignore[attr-defined]
    if reporter is not None and reporter.report is not None:
        report = Path(reporter.dirpath or folder) / REPORT_FILE
        (numbers if reporter.report.example is None else texts).append(report)
    if module.benchmark is not None:
        texts += sorted(folder.glob(f"{module.benchmark.name}-step=*.json"))
    return [path for path in numbers if path.is_file()], [path for path in texts if path.is_file()]


def _attach_to(logger: Logger, files: list[Path], step: int) -> list[str]:
    """Attach those of the files that a logger takes, and return their names."""
    pictures = [path for path in files if path.suffix == ".png"]
    if isinstance(logger, MLFlowLogger):
        for path in files:
            logger.experiment.log_artifact(logger.run_id, str(path))
        return [path.name for path in files]

    if isinstance(logger, WandbLogger):
        # An image is shown beside the curves. `save` would only list it among the files.
        for picture in pictures:
            logger.log_image(f"pictures/{picture.stem}", [str(picture)], step=step)
        for path in files:
            if path not in pictures:
                logger.experiment.save(str(path), base_path=str(path.parent), policy="now")
        return [path.name for path in files]

    if isinstance(logger, TensorBoardLogger):
        from matplotlib.image import imread

        for picture in pictures:
            logger.experiment.add_image(f"pictures/{picture.stem}", imread(picture), step, dataformats="HWC")
        return [picture.name for picture in pictures]
    return []
