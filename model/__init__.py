"""The network, its training, and how it is split across ranks."""
