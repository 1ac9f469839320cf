"""The console: pages at `/` and `/docs`, and the read-only routes that they need."""
