"""Pictures of a run, and of models side by side, drawn from files alone.

Nothing here trains or measures; what a fit records for its pictures is in ``callbacks/picture.py``.
"""

from lit_unlearn.plotting.attacks import draw_attacks
from lit_unlearn.plotting.run import draw_dual, draw_finetuning, draw_run, draw_trajectory
from lit_unlearn.plotting.run_log import NothingToDraw, RecordedAnswer, RunLog, read_run, write_picture_data
from lit_unlearn.plotting.tokens import draw_tokens
from lit_unlearn.plotting.trade_off import draw_trade_off

__all__ = [
    "NothingToDraw",
    "RecordedAnswer",
    "RunLog",
    "draw_attacks",
    "draw_dual",
    "draw_finetuning",
    "draw_run",
    "draw_tokens",
    "draw_trade_off",
    "draw_trajectory",
    "read_run",
    "write_picture_data",
]
