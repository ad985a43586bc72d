"""Files on disk, processes of a run and checks of numbers, for every other package.

Nothing here knows of models, data or Lightning.
"""
