"""The comparison of methods on TOFU, in three tiers: small models from scratch, a pretrained model, and published ones.

Of the small tier, `protocol` has the settings and `sweep` runs it. Of the others, `smollm2` and `tofu_1b` are the protocols, and
``python -m benchmarks.quality`` runs them with ``lit-unlearn sweep``. Results are stored in ``results/``, one JSON Lines file per
stage; ``make results`` writes the tables of docs/results.md from them.
"""
