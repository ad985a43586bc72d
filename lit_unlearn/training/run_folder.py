"""The folders that a run writes to, whatever its loggers are. Nothing is written anywhere else."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

# A trainer without a folder of its logger's gets a new one, which must stay the same.
_folders: WeakKeyDictionary[L.Trainer, Path] = WeakKeyDictionary()


def is_dry_run(trainer: L.Trainer) -> bool:
    """Return whether the Trainer only tries out a few batches (``fast_dev_run``), so that nothing is to be written."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def find_run_folder(trainer: L.Trainer) -> Path:
    """Return the folder of one start of a run, for report, configuration, results, pictures and export.

    It is that of a CSV or TensorBoard logger, or what another logger's ``save_dir``, ``name`` and ``version`` make, or
    else a new ``runs/version_<n>`` in the Trainer's ``default_root_dir``. It is never the working directory.

    The first call is collective, and creates a new folder; do not call it in a dry run.
    """
    if trainer not in _folders:
        folder = _choose_run_folder(trainer) if trainer.is_global_zero else ""
        # The first process decides: the others may count one version more.
        _folders[trainer] = Path(trainer.strategy.broadcast(folder))
    return _folders[trainer]


def find_checkpoint_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of a run's checkpoints, which is the same for every start of the run.

    Returns:
        ``None`` if the logger does not know yet which run this is.
    """
    logger = _first_logger(trainer)
    if logger is None:
        return Path(trainer.default_root_dir) / "runs" / "checkpoints"
    # Both number the starts of a run. For other loggers, many runs share a name, that of a project.
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(logger.save_dir, str(logger.name), "checkpoints")
    version = _version_folder(trainer, logger)
    return version and version / "checkpoints"


def _choose_run_folder(trainer: L.Trainer) -> str:
    logger = _first_logger(trainer)
    folder: Path | None = None
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        folder = Path(logger.log_dir)
    elif logger is not None:
        folder = _version_folder(trainer, logger)
    if folder is not None and not Path.cwd().is_relative_to(folder.resolve()):
        return str(folder)

    number = 0
    while True:
        folder = Path(trainer.default_root_dir) / "runs" / f"version_{number}"
        try:
            # Another run may look for its number at the same time.
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return str(folder)


def _first_logger(trainer: L.Trainer) -> Logger | None:
    """Return the logger whose folder the run's is: one that has a folder of its own for each start, if there is one."""
    loggers = [logger for logger in trainer.loggers if "://" not in str(logger.save_dir)]
    for kind in (CSVLogger, TensorBoardLogger, Logger):
        for logger in loggers:
            if isinstance(logger, kind):
                return logger
    return None


def _version_folder(trainer: L.Trainer, logger: Logger) -> Path | None:
    if logger.version is None:
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name or ""), version)
