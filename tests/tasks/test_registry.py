"""Which task a config is about."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from simvq_moe.config import tasks as known
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import tasks
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.image import ImageTokenizerTask
from simvq_moe.tasks.registry import AnyTask, register, task_of


def test_every_task_has_a_name_sections_and_an_embedded_source_of_its_own() -> None:
    known = {field.name for field in fields(Config)}
    names = {task.name for task in tasks()}
    assert names == {"image_tokenizer", "audio_tokenizer", "language_model"}
    assert len({task.embedded for task in tasks()}) == len(names)
    for task in tasks():
        assert set(task.sections) <= known
        assert {key.partition(".")[0] for key in task.depths} <= set(task.sections)


def test_a_task_that_is_registered_later_takes_its_configs_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks()
    monkeypatch.setattr(known, "_REGISTERED", [*known._REGISTERED])

    @register
    class Large(ImageTokenizerTask):
        @classmethod
        def takes(cls, config: Config) -> bool:
            return super().takes(config) and config.data.image_size > 100

    large = replace(Config(), data=replace(Config().data, image_size=128))
    assert task_of(large) is Large
    assert task_of(Config()) is ImageTokenizerTask


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
def test_a_measure_that_a_task_does_not_have_is_named(task: type[AnyTask]) -> None:
    with pytest.raises(ConfigError, match=f"--mos: task '{task.name}' has no such measure"):
        task.check_measures(["mos"])
