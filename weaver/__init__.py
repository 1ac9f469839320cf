"""Weaver: post-training of language models, from a laptop to a shared server."""
