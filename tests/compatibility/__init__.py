"""What the engine makes of every causal language model that transformers has.

`python -m tests.compatibility` writes `docs/compatibility.md`; the tests beside it run a dozen
families, and all of them where slow tests run.
"""
