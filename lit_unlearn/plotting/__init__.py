"""Pictures of a run, and of models side by side."""

from lit_unlearn.plotting.run import draw_dual, draw_run, draw_teaching, draw_trajectory
from lit_unlearn.plotting.run_log import Answer, NothingToDraw, Run, read_run, write_record
from lit_unlearn.plotting.tokens import draw_tokens
from lit_unlearn.plotting.trade_off import draw_trade_off

__all__ = [
    "Answer",
    "NothingToDraw",
    "Run",
    "draw_dual",
    "draw_run",
    "draw_teaching",
    "draw_tokens",
    "draw_trade_off",
    "draw_trajectory",
    "read_run",
    "write_record",
]
