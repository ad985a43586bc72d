"""The comparison of methods on TOFU: `protocol` has the settings, `sweep` runs it, `tables` and `bound_pictures` show it.

Results are stored in ``results/``, one JSON Lines file per stage; ``make results`` writes the tables of docs/results.md
from them.
"""
