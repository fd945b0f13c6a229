"""Errors a user can act on: one sentence that names the thing and the remedy."""


class TokenpoError(Exception):
    """Base of every error that tokenpo raises on purpose. The command line turns it into exit code 2."""


class InputError(TokenpoError, ValueError):
    """A value, shape, name or file that the caller can correct."""


class MissingInputError(TokenpoError, KeyError):
    """Something a method needs was not given."""

    def __str__(self) -> str:  # KeyError would print the repr, quotes included
        return str(self.args[0])
