"""What a language model's run makes: text, or of codes images and sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simvq_moe.config.flags import check_least
from simvq_moe.core.search.nearest import NotFiniteError
from simvq_moe.data.text.tokenizer import encode_text, end_of_text
from simvq_moe.engine.devices import this_device
from simvq_moe.errors import ConfigError
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.codes import CodesTask, check_same_vocabulary, codes_of, draw_sequences
from simvq_moe.tasks.decoder import Decoder
from simvq_moe.tasks.loading import load_model, load_run, model_of
from simvq_moe.tasks.registry import task_of

SAMPLES_AT_A_TIME = 64
"""Samples that are drawn together."""
LEAST_TEMPERATURE = 1e-4
"""Below it scores over the temperature leave the range of float32."""


@dataclass(frozen=True)
class Drawing:
    """How new tokens are drawn: flags of `generate`.

    Raises:
        ConfigError: one is out of its range.
    """

    temperature: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        check_least(temperature=(self.temperature, 0), top_k=(self.top_k, 0))
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"--temperature {self.temperature} < {LEAST_TEMPERATURE}: use 0 for the best token"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed} has more than 64 bits: use 0 to {2**63 - 1}")

    def options(self) -> dict[str, Any]:
        """Arguments of `LanguageModel.generate`, with a generator at the start of its numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return {"temperature": self.temperature, "top_k": self.top_k, "generator": generator}

    @contextmanager
    def of_finite_scores(self, run_dir: Path) -> Iterator[None]:
        """Name the run whose model has no scores to draw by."""
        try:
            yield
        except NotFiniteError as error:
            raise ConfigError(
                f"{run_dir}: {error}: the run has diverged, use another checkpoint or train again"
            ) from None


def generate_text(
    run_dir: Path, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """The prompt, as the beginning of a document, and a continuation of so many tokens.

    The prompt is encoded as documents are for training: a special token that it quotes is text, and
    nothing is put before or behind it.

    Raises:
        ConfigError: it is no run of a language model, a number is out of its range, or the prompt
            is no text.
    """
    check_least(tokens=(tokens, 1))
    drawing = Drawing(temperature, top_k, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt {prompt!r} is no UTF-8: give text in that encoding") from None
    config, model = load_model(run_dir)
    tokenizer = task_of(config).text_tokenizer(config, run_dir)
    if tokenizer is None:
        raise ConfigError(
            f"{run_dir} is a run of task {config.task!r} without a tokenizer.json: give the "
            "folder of a language model's run, and --out for one on codes"
        )
    assert isinstance(model, LanguageModel)
    beginning = torch.tensor([[end_of_text(tokenizer), *encode_text(tokenizer, prompt)]])
    with drawing.of_finite_scores(run_dir):
        whole = model.generate(beginning, tokens, **drawing.options())
    return tokenizer.decode(whole[0].tolist())


def generate_samples(
    run_dir: Path, out: Path, samples: int, *, temperature: float, top_k: int, seed: int
) -> None:
    """Write new images or clips of a language model's run as out/000000.png ... or .wav.

    Raises:
        ConfigError: it is no run on codes, `out` is not empty, or a number is out of its range.
    """
    check_least(samples=(samples, 1))
    drawing = Drawing(temperature, top_k, seed)
    check_free(out)
    config, weights = load_run(run_dir)
    if not issubclass(task_of(config), CodesTask):
        raise ConfigError(
            f"--out {out}: {run_dir} is no language model on codes, or those in data.source "
            f"{config.data.source!r} are gone: drop --out for text"
        )
    decoder = Decoder(codes_of(config), this_device())
    model = model_of(config, weights)
    assert isinstance(model, LanguageModel)
    check_same_vocabulary(config, decoder.manifest)
    model.to(decoder.device)
    options = drawing.options()
    made_of = {"weights": weights.digest(), "codes": decoder.manifest.digest}
    made_of |= {"samples": samples, "temperature": temperature, "top_k": top_k, "seed": seed}
    with filling(out, "generate", made_of), drawing.of_finite_scores(run_dir):
        # all from the first on, because a batch's random numbers follow those of the one before
        for start in range(0, samples, SAMPLES_AT_A_TIME):
            number = min(SAMPLES_AT_A_TIME, samples - start)
            sequences = draw_sequences(model, decoder.manifest, number, **options)
            decoder.write(sequences, out, start)
