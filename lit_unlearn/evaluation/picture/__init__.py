"""Pictures of a run, and of models side by side."""

from lit_unlearn.evaluation.picture.record import Answer, NothingToDraw, Run, read_run, write_record
from lit_unlearn.evaluation.picture.run import draw_dual, draw_run, draw_teaching, draw_trajectory
from lit_unlearn.evaluation.picture.tokens import draw_tokens
from lit_unlearn.evaluation.picture.trade_off import draw_trade_off

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
