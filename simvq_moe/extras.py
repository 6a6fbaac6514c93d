"""Which extra of this package brings a package that the base does without."""

from __future__ import annotations

import importlib.util

from simvq_moe.errors import ConfigError

EXTRAS = {
    **dict.fromkeys(
        (
            *("PIL", "datasets", "deepspeed", "fsspec", "psutil", "pyarrow", "pydantic"),
            *("rich", "shtab", "soundfile", "tensorboard", "tokenizers", "typing_extensions"),
            "tyro",
            "yaml",
        ),
        "train",
    ),
    **dict.fromkeys(("jinja2", "markupsafe", "matplotlib"), "report"),
    "torchmetrics": "image",
    "torch_fidelity": "fid",
    **dict.fromkeys(("pesq", "pystoi", "scipy"), "audio"),
    **dict.fromkeys(("captcha", "skimage", "sklearn"), "demo"),
    "transformers": "hf",
    "lightning": "lightning",
    "lm_eval": "eval",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Extras by the name that is imported."""


def is_missing(error: ModuleNotFoundError) -> ConfigError | None:
    """The line for a package that is not installed; None: no extra brings it."""
    name = (error.name or "").partition(".")[0]
    return ConfigError(not_installed(name)) if name in EXTRAS else None


def not_installed(name: str) -> str:
    """What to say of a package that is missing, by the name that is imported."""
    way = f"'simvq-moe[{EXTRAS[name]}]'" if name in EXTRAS else name
    return f"{name} is not installed: pip install {way}"


def is_installed(name: str) -> bool:
    """Whether there is a package to import, which a folder that has its name is not."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None
