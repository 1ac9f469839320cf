"""A day of a large installation in minutes: the real service, pool and router, on modelled devices.

`python -m tests.simulate` writes docs/simulation.md; tests/simulate/test_simulate.py runs a small
one.
"""
