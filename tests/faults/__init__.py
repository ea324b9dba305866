"""Faults on purpose, and a count of what is lost: `make faults`."""
