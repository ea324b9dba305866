"""The stages of tools/benchmark.py."""
