"""What is measured: the held-out part of a run's data, or of another source."""

from __future__ import annotations

import pytest

from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.inference.evaluate import with_source


def test_an_empty_source_is_refused_and_not_taken_for_the_working_directory() -> None:
    with pytest.raises(ConfigError, match=r"--data '' is empty: give a source"):
        with_source(Config(), "")
