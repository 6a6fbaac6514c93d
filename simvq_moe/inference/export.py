"""A run's model out of here: a checkpoint of a standard architecture of `transformers`, or a file
of weights that says what it is.

Maps are folded first. A checkpoint is loaded by `transformers` and compared before it is written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from simvq_moe.config.loading import to_yaml
from simvq_moe.data.text.tokenizer import end_of_text
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CONFIG
from simvq_moe.files.regular import write_atomically, write_json
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.inference.architectures import (
    architecture_of,
    misfits,
    settings_of,
    weights_of,
)
from simvq_moe.inference.fold import Folded, folded_run, write_weights
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.runs.loading import FOLDED
from simvq_moe.tasks.loading import model_of
from simvq_moe.tasks.registry import task_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Form = Literal["hf", "safetensors"]

LARGEST_DIFFERENCE = 1e-4
"""Between logits here and there, in float32, relative to the largest."""
COMPARED_TOKENS, ATTEMPTS = 32, 3
"""Random tokens that are compared, and draws of them: at a tie of two experts within rounding, one
draw may differ where the models do not."""


def export_run(run_dir: Path, out: Path, form: Form) -> str:
    """Write a run's model, without maps, for others to load; what it has become, in words.

    Killed at any moment, the same call goes on.

    Args:
        form: "hf": a folder for `AutoModelForCausalLM` and `AutoTokenizer` of transformers;
            "safetensors": one file with our names, whose header holds the config.

    Raises:
        ConfigError: the run can't be exported so; the line says which option would.
    """
    check_free(out)
    if form == "hf":
        return _export_checkpoint(run_dir, out)
    folded = folded_run(run_dir, plain=True)
    notes = {"format": "pt", CONFIG: to_yaml(folded.config)}
    notes |= {name: content.decode() for name, content in folded.files.items()}
    with filling(out, "export", {"weights": folded.made_of, "form": form}):
        write_weights(out / FOLDED, folded.weights, notes)
    return f"{FOLDED}, {folded.difference:.1g} from the run's outputs in float64"


def _export_checkpoint(run_dir: Path, out: Path) -> str:
    folded = folded_run(run_dir, plain=True)
    tokenizer = _tokenizer_of(folded, run_dir)
    config = _transformers_config(folded, tokenizer)
    weights = weights_of(folded.config, dict(folded.weights))
    difference = _difference(folded, config, weights, end_of_text(tokenizer))
    if not difference <= LARGEST_DIFFERENCE:
        raise ConfigError(
            f"{run_dir}: logits of the exported model differ by {difference:.2g} of the largest, "
            "or are not finite: the run has diverged, use another checkpoint or train again"
        )
    with filling(out, "export", {"weights": folded.made_of, "form": "hf"}):
        write_weights(out / FOLDED, weights, {"format": "pt"})
        write_json(out / "generation_config.json", _generation_settings(config))
        for name, content in tokenizer_files(tokenizer, folded.config.data.context).items():
            write_atomically(out / name, content)
        # `transformers` of an older form look for the base here
        settings = config.to_diff_dict() | {"rope_theta": config.rope_parameters["rope_theta"]}
        write_json(out / "config.json", settings)
    name = architecture_of(folded.config).class_name
    return f"{name}, logits {difference:.1g} from ours in float32"


def _tokenizer_of(folded: Folded, run_dir: Path) -> Tokenizer:
    """The text tokenizer of a run that a checkpoint can be made of.

    Raises:
        ConfigError: it has none, or its model is of no standard architecture.
    """
    other = "or use --to safetensors"
    tokenizer = task_of(folded.config).text_tokenizer(folded.config, run_dir)
    if tokenizer is None:
        raise ConfigError(
            f"{run_dir} is a run of task {folded.config.task!r} without a tokenizer.json: --to hf "
            f"takes a language model on text: give one, {other}"
        )
    for problem in misfits(folded.config):
        raise ConfigError(f"{run_dir}: {problem}, {other}")
    return tokenizer


def _transformers_config(folded: Folded, tokenizer: Tokenizer) -> Any:
    """The configuration of the architecture, an object of `transformers`."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            f"--to hf needs transformers ({error}): pip install 'simvq-moe[hf]'"
        ) from None
    of, end = architecture_of(folded.config), end_of_text(tokenizer)
    return AutoConfig.for_model(
        of.model_type,
        architectures=[of.class_name],
        dtype="float32",
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        **settings_of(folded.config),
    )


def _generation_settings(config: Any) -> dict[str, Any]:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True, **ids, "transformers_version": config.transformers_version}


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, str]:
    """The files of a tokenizer of `transformers` that encodes as we do, by name.

    A text is encoded whole and with nothing added. The end of text also begins a text, for a model
    that is asked to continue nothing, and fills up batches.
    """
    end = tokenizer.id_to_token(end_of_text(tokenizer))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(about, indent=1) + "\n",
    }


@torch.no_grad()
def _difference(folded: Folded, config: Any, weights: Mapping[str, Tensor], end: int) -> float:
    """The largest between logits of both models, relative to the largest of ours."""
    ours = model_of(folded.config, folded.weights).eval()
    assert isinstance(ours, LanguageModel)
    theirs = built_by_transformers(config, weights)
    found = []
    for attempt in range(ATTEMPTS):
        tokens = _tokens(folded, end, attempt)
        before, after = ours.logits(tokens)[0], theirs(tokens).logits
        found.append(float((after - before).abs().max() / before.abs().max()))
    return min(found)


def built_by_transformers(config: Any, weights: Mapping[str, Tensor]) -> Any:
    """The model of a configuration with weights by the names of its checkpoints.

    Raises:
        ConfigError: they are not all of them, or more.
    """
    import transformers

    cls = getattr(transformers, config.architectures[0])
    with _quiet(transformers.utils.logging):
        model, report = cls.from_pretrained(
            None, config=config, state_dict=dict(weights), output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in report[kind]:
            raise ConfigError(
                f"--to hf: {name} is among the {kind.replace('_', ' ')} of transformers "
                f"{transformers.__version__}: use transformers>=5, or --to safetensors"
            )
    return model.eval()


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without a progress bar, and without a word on networks of no channels."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokens(folded: Folded, end: int, seed: int) -> Int64[Tensor, "1 tokens"]:
    """Random tokens of one document."""
    data = folded.config.data
    random = torch.Generator().manual_seed(seed)
    size = (1, min(COMPARED_TOKENS, data.context))
    tokens = torch.randint(data.vocabulary - 1, size, generator=random)
    return tokens + (tokens >= end)
