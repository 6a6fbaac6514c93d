"""Shared maps and usage meters inside models of other libraries."""
