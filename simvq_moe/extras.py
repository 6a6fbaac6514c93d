"""Which extra of this package brings a package that the base does without."""

from __future__ import annotations

from simvq_moe.errors import ConfigError

EXTRAS = {
    **dict.fromkeys(
        (
            *("PIL", "datasets", "deepspeed", "fsspec", "psutil", "pyarrow", "pydantic"),
            *("rich", "soundfile", "tensorboard", "tokenizers", "typing_extensions", "tyro"),
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
    "lm_eval": "eval",
}
"""By the name that is imported."""


def is_missing(error: ModuleNotFoundError) -> ConfigError | None:
    """The line for a package that is not installed; None: no extra brings it."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return ConfigError(f"{name} is not installed: pip install 'simvq-moe[{EXTRAS[name]}]'")
