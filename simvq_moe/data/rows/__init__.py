"""Rows of files: what one is, those with columns, and folders that `datasets` has saved."""
