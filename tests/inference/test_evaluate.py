"""What is measured: the held-out part of a run's data, or of another source."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.inference.evaluate import evaluate_run, with_source
from simvq_moe.tasks.text import LanguageModelTask
from tests.training.test_streams import flags, write_rows


def test_an_empty_source_is_refused_and_not_taken_for_the_working_directory() -> None:
    with pytest.raises(ConfigError, match=r"--data '' is empty: give a value"):
        with_source(Config(), "")


def test_a_source_or_cache_whose_name_no_file_can_say_is_refused(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"--data 'caf\\udce9' has characters"):
        with_source(Config(), name)
    with pytest.raises(ConfigError, match=r"--cache_dir .*caf\\udce9' has characters"):
        evaluate_run(tmp_path, None, cache_dir=tmp_path / name)


def test_another_source_is_measured_in_place_of_a_whole_mixture(tmp_path: Path) -> None:
    red, blue, other = (str(write_rows(tmp_path / name)) for name in ("red", "blue", "other"))
    mixture = ("--data.sources", red, blue, "--data.source_weights", "2", "1")
    config = with_flags(Config(), flags(tmp_path, "mixture", *mixture), "train")
    config = with_source(config, other)
    check(config)
    task = LanguageModelTask.of_run(config, run_dir=tmp_path)
    text = task.corpus.decode(np.asarray(task.corpus.held_out.tokens))
    assert "other " in text
    assert not {"red", "blue"} & set(text.split())
