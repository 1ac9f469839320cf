"""What all wire formats of a server share: `App` mounts them, `run_server` listens."""
