"""Errors that a user can act on."""


class StocktakeError(Exception):
    """Something in the user's hands is wrong: a file, a value, an option, a server.

    The message is one line that names the thing and the way out. The command line prints it and
    exits with code 2, without a traceback unless `--debug` is given.
    """
