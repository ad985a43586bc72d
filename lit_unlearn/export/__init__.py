"""Exports: model directories made of checkpoints, their record, their model card, and their upload.

No callback belongs here (see ``callbacks/``), and nothing that measures a model.
"""
