"""Errors that a user can mend. Their message is one line: the file or key, the value found, the remedy."""

__all__ = ["ConfigError", "DataError", "UserError"]


class UserError(ValueError):
    """A mistake in the input rather than in the program; the command line prints it and exits with code 2."""


class ConfigError(UserError):
    """A configuration file or override that cannot be used."""


class DataError(UserError):
    """An image, mask or data set that cannot be used."""
