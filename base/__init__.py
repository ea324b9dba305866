"""Errors, files and the machine. Every package may import this one; it imports no torch, DALI or OpenCV."""
