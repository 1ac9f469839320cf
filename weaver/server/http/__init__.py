"""What all wire formats of a server share: `create_app` mounts them, `run_server` listens."""
