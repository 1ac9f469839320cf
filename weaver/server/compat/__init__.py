"""Other wire formats over the same service: thin adapters, mounted by `weaver.server.http.app`."""
