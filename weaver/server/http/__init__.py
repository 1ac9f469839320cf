"""The HTTP front of a service: `create_app` makes it, `weaver serve` runs it."""
