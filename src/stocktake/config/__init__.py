"""Settings of every command: dataclasses whose field docstrings are the help and whose annotations are the bounds.

Nothing heavy is imported, so that `stocktake COMMAND --help` answers at once. A command's config inherits the fields
that it shares with others; the ladder's config is every stage's config at once.
"""
