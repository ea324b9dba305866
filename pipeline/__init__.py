"""Raw images -> LMDB shards -> augmented batches on the device."""

import click


class DataError(click.ClickException):
    """Bad input or a damaged data set: one line that says what is wrong and what to do (exit code 1)."""
