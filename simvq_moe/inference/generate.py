"""What a language model's run makes: text, or of codes images and sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simvq_moe.core.search.nearest import NotFiniteError
from simvq_moe.errors import ConfigError
from simvq_moe.files.unfinished import check_free
from simvq_moe.tasks.drawing import Drawing, DrawnFrom
from simvq_moe.tasks.loading import load_run
from simvq_moe.tasks.registry import task_of


def generate_text(
    run_dir: Path, prompt: str, *, tokens: int, temperature: float | None, top_k: int, seed: int
) -> str:
    """The prompt, as the beginning of a document, and a continuation of so many tokens.

    The prompt is encoded as documents are for training: a special token that it quotes is text, and
    nothing is put before or behind it.

    Raises:
        ConfigError: it is no run of a language model, the temperature is too low, or the prompt is
            no text.
    """
    drawing = Drawing(temperature, top_k, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt {prompt!r} is no UTF-8: give text in that encoding") from None
    run = DrawnFrom(run_dir, *load_run(run_dir))
    with _finite_scores(run_dir):
        return task_of(run.config).continued(run, prompt, tokens, drawing)


def generate_samples(
    run_dir: Path, out: Path, samples: int, *, temperature: float | None, top_k: int, seed: int
) -> None:
    """Write new images or clips of a language model's run as out/000000.png ... or .wav.

    Raises:
        ConfigError: it is no run on codes, `out` is not empty, or the temperature is too low.
    """
    drawing = Drawing(temperature, top_k, seed)
    check_free(out)
    run = DrawnFrom(run_dir, *load_run(run_dir))
    with _finite_scores(run_dir):
        task_of(run.config).write_new_samples(run, out, samples, drawing)


@contextmanager
def _finite_scores(run_dir: Path) -> Iterator[None]:
    """Name the run whose model has no scores to draw by."""
    try:
        yield
    except NotFiniteError as error:
        raise ConfigError(
            f"{run_dir}: {error}: the run has diverged, use another checkpoint or train again"
        ) from None
