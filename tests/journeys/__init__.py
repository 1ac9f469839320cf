"""The jobs of docs/jobs.md, each done from an empty folder as the page says."""
