"""How the network is trained: recipe, step, checkpoints, evaluation."""
