"""Several ranks: how they start, and which part of the network each holds."""
