"""The comparison of methods on TOFU: `protocol` says what is run, `sweep` runs it, `tables` and `bound_pictures` show it.

Results are kept in ``results/``, one JSON Lines file per stage; docs/results.md is filled from them by ``make results``.
"""
