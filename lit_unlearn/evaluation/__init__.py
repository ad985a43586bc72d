"""Measuring models: suites on streams during validation, benchmarks with examples of their own, attacks, and their results.

Pictures belong in ``plotting/``, records and model cards in ``export/``.
"""
