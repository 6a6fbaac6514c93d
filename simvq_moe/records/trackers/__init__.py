"""Where a run is logged to beside metrics.jsonl: a file each tracker, none of which can stop it."""
