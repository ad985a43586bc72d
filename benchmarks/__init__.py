"""Benchmarks of lit_unlearn, each a module that you run from a checkout: ``python -m benchmarks.step --help``.

`step` and `scaling` measure time and memory, `methods` compares all methods on a tiny model, `startup` times the command
line, `quality` is the comparison on TOFU, and `real` is one run on the pretrained model that `smollm2` fetches. `readme` writes
their results into the README and docs/. Code that a user of the package needs belongs in lit_unlearn.
"""
