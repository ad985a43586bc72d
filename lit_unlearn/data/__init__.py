"""Data modules and what they are made of: rows become examples of token ids with labels, examples become resumable batches.

Losses, models and whatever trains belong elsewhere.
"""
