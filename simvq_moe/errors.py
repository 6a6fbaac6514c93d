"""The one error that a user causes, and can mend."""


class ConfigError(ValueError):
    """A usage or configuration error: one line for the user, exit code 2, nothing written."""
