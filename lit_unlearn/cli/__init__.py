"""The command line: ``main.py``, one file per command, and what the commands share.

Nothing heavy is imported here or in ``main.py``, so that ``--version`` and ``--help`` answer at once.
"""

from lit_unlearn.cli.main import COMMANDS, CONFIGS, HELP, TRAINER_COMMANDS, find_configs, main

__all__ = ["COMMANDS", "CONFIGS", "HELP", "TRAINER_COMMANDS", "find_configs", "main"]
