"""The one error that a user causes, and can mend; and how processes of ours say that they ended."""

FINISHED, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
"""Exit codes; that of a `ConfigError` is USAGE_ERROR."""


class ConfigError(ValueError):
    """A usage or configuration error: one line for the user, exit code 2, nothing written."""
