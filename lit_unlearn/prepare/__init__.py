"""Rows that a user does not have: alternate answers, a retain set, unseen rows and paraphrases, made with a model.

Here are functions from rows to rows. Reading and writing files is the command's, `lit_unlearn.cli.prepare`.
"""

from lit_unlearn.prepare.alternates import make_alternates
from lit_unlearn.prepare.paraphrases import make_paraphrases
from lit_unlearn.prepare.retain import find_neighbours, make_retain, read_general_prompts
from lit_unlearn.prepare.rows import Ask, Prepared, ask_with
from lit_unlearn.prepare.unseen import make_unseen

__all__ = [
    "Ask",
    "Prepared",
    "ask_with",
    "find_neighbours",
    "make_alternates",
    "make_paraphrases",
    "make_retain",
    "make_unseen",
    "read_general_prompts",
]
