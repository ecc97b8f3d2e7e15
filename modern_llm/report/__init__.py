"""Reports of run folders: one self-contained HTML page, and the model card.

Reads only the documented files of a run folder, and imports no training code.
"""
