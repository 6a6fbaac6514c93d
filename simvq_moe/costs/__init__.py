"""Parameters, FLOPs, memory and communication of a run before it runs; nothing runs here."""
