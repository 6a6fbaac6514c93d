"""Train in this process: flags to their end, or a config for two steps on quickly read data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import to_yaml
from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.records.catalogue import find
from simvq_moe.tasks import text
from simvq_moe.tasks.registry import task_of
from simvq_moe.training.loop import Trainer
from tests.launching import ROOT


@contextlib.contextmanager
def short_samples() -> Iterator[None]:
    """Text is continued by a few tokens; by 64 it would take most of the time of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CONTINUATION", 4)
        yield


def train_flags(world: World, folder: Path, *flags: str) -> Path:
    """Train what flags say, on every rank of the world; the run's folder, with its config."""
    kept = ("--runs_dir", str(folder / "runs"), "--data.cache_dir", str(folder / "cache"))
    config = with_flags(Config(), (*flags, *kept), "train")
    config = task_of(config).fit_to_data(config)
    check(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with short_samples(), contextlib.closing(Trainer(config, world, lambda: False)) as trainer:
        trainer.run()
    if world.is_main:
        (config.run_dir / "config.yaml").write_text(to_yaml(config))
        assert_described(config.run_dir)
    return config.run_dir


def assert_described(run_dir: Path) -> None:
    """Whatever the run has logged is in the catalogue of metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    unknown = {name for line in lines for name in json.loads(line) if find(name) is None}
    assert not unknown, f"describe in simvq_moe/records: {sorted(unknown)}"


def in_two_steps(config: Config) -> Config:
    """What `train_two_steps` trains."""
    config = _in_small(config)
    short = replace(config.train, steps=2, log_every=1, eval_every=2, save_every=2)
    short = replace(short, probe_tokens=min(512, short.probe_tokens))
    data = replace(config.data, crops=64, held_out_crops=18)
    if config.task == "language_model" and data.source in (None, "python-stdlib"):
        data = replace(data, source=str(ROOT / "tests" / "moe"))  # a hundredth of the text
    return replace(config, train=short, data=data)


def _in_small(config: Config) -> Config:
    """A recipe for clusters on embedded data: fewer pixels, channels and codes, and no VGG16."""
    if config.task == "audio_tokenizer":
        return _audio_in_small(config)
    if config.data.streaming:
        return _text_in_small(config)
    if config.data.image_size <= 64:
        return config
    q = _few_codes(config.quantizer)
    image = replace(config.image_tokenizer, hidden=8, discriminator_hidden=4, lpips_weight=0.0)
    data = replace(
        config.data, source="photos", held_out_source=None, image_size=32, shorter_side=0
    )
    train = replace(config.train, batch_size=4)
    return replace(config, quantizer=q, image_tokenizer=image, data=data, train=train)


def _text_in_small(config: Config) -> Config:
    small = {"source": None, "streaming": False, "tokenizer": None, "vocabulary": 512}
    data = replace(config.data, context=64, **small)
    model = replace(config.language_model, width=64, layers=2)
    train = replace(config.train, batch_size=4, accumulation=1)
    moe = replace(config.moe, hidden=16)
    return replace(config, data=data, language_model=model, moe=moe, train=train)


def _audio_in_small(config: Config) -> Config:
    data = replace(config.data, source="spoken-characters")
    if data.sample_rate <= 8_000:
        return replace(config, data=data)
    audio = replace(config.audio_tokenizer, hidden=2, discriminator_hidden=1)
    data, train = replace(data, audio_seconds=0.1), replace(config.train, batch_size=4)
    q = _few_codes(config.quantizer)
    return replace(config, quantizer=q, audio_tokenizer=audio, data=data, train=train)


def _few_codes(q: QuantizerOptions) -> QuantizerOptions:
    if q.codes <= 1_024:
        return q
    shapes = {"fsq": {"levels": (8, 5, 5, 5), "width": 4, "codes": 1_000}, "lfq": {"width": 10}}
    return replace(q, **({"codes": 1_024} | shapes.get(q.kind, {})))


def train_two_steps(
    config: Config, folder: Path, world: World, cache: Path | None = None
) -> dict[str, float]:
    """Its final numbers.

    Args:
        folder: of runs.
        cache: folder of what is derived from the data, shared with others; None: one of its own.
    """
    check(config)
    config = in_two_steps(config)
    data = replace(config.data, cache_dir=str(cache or folder.parent / "cache"))
    config = replace(config, runs_dir=str(folder), data=data)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    with short_samples(), contextlib.closing(Trainer(config, world, lambda: False)) as trainer:
        summary = trainer.run()
    if world.is_main:
        assert_described(config.run_dir)
    return summary
