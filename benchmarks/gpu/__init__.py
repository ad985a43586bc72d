"""One command that proves and measures the package on a GPU: ``make gpu``, or ``python -m benchmarks.gpu``.

What it measures is in ``stages.py``; how stages are run, limited in time and resumed is in ``__main__.py``.
"""
