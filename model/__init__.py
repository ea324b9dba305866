"""All that holds or moves weights: the network, its recipe, checkpoints and parallel layouts."""

import click


class ModelError(click.ClickException):
    """A checkpoint or option that cannot be used: one line that says what to do (exit code 1)."""
