"""Training: options, recipe, step, log, checkpoints, evaluation."""
