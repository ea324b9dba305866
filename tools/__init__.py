"""Command-line tools, one click command per file."""
