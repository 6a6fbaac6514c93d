"""Reading finished and unfinished runs: statistics over paired seeds, and the report."""
