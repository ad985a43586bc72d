"""What every part may use: files on disk and the processes of a run.

Nothing here knows of models, data or Lightning; two files are all there is.
"""
