"""Run the sweep: ``python -m benchmarks.quality`` is ``python -m benchmarks.quality.sweep``."""

from benchmarks.quality.sweep import main

main()
