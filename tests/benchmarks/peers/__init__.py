"""Whole processes in turns, ours and those of other projects: see `run.py`."""
