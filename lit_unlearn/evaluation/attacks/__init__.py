"""Attacks on unlearned models: each changes the model or the question, and measures again.

One file each. What is measured, and how, belongs in ``evaluation/``.
"""
