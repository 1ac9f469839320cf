"""What int8 and nf4 change, measured: `python -m tests.quantised` writes docs/quantised.md."""
