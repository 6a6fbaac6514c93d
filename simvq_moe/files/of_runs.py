"""Names of the files and folders of a run, and of a sweep."""

from __future__ import annotations

CONFIG, META, METRICS, SUMMARY = "config.yaml", "meta.json", "metrics.jsonl", "summary.json"
USAGE, PROBE, SPECTRA = "usage.npz", "probe.npz", "spectra.npz"
SWEEP = "sweep.json"
NOISE, LOGS = "log.txt", "logs"
"""What libraries say on the first rank; folder of what they say on the others."""
CHECKPOINTS = "checkpoints"
FOLDERS = (CHECKPOINTS, "samples", "tensorboard", "wandb", "profile")
"""Folders of a run, in which there are no other runs."""
