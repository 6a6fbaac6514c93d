"""Usage of experts in runs of transformers' Trainer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from simvq_moe import usage
from simvq_moe.cli import main
from simvq_moe.integrations.callback import UsageCallback
from simvq_moe.reports.dashboard import link_runs
from simvq_moe.usage_tab import answers
from simvq_moe.usage_tab.folders import Folder
from tests.integrations.test_meters import counted, plain, said_by_routers
from tests.integrations.test_transformers import EXPERTS, SHAPE, tokens

LAYERS = SHAPE["num_hidden_layers"]


def trainer_of(folder: Path, model: Any, **options: Any) -> Trainer:
    mask = torch.ones(20, dtype=torch.int64)
    mask[:4] = 0
    rows = [{"input_ids": row, "labels": row, "attention_mask": mask} for row in tokens()]
    given = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=3,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=given, train_dataset=rows)  # pyright: ignore[reportArgumentType]


def test_a_run_of_the_trainer_logs_the_counts_of_its_routers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "own"))
    model, folder = plain("mixtral"), tmp_path / "runs" / "mine"
    said = said_by_routers(model)
    trainer = trainer_of(tmp_path / "out", model, report_to=["tensorboard"])
    trainer.add_callback(UsageCallback(trainer, folder=folder))
    trainer.train()
    mask = torch.ones(3, 20)
    mask[:, :4] = 0
    of_passes: list[Tensor] = [counted(ids, mask) for ids in said]
    assert len(of_passes) == 4 * LAYERS
    by_step = torch.stack(of_passes).view(2, 2, LAYERS, EXPERTS).sum(1)
    saved = np.load(folder / "usage.npz")
    assert saved["steps"].tolist() == [2, 4]
    np.testing.assert_array_equal(saved["counts"], by_step.numpy())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = usage(by_step[1][2])
    assert lines[1]["moe/02/used"] == last.used
    assert lines[1]["moe/02/max_vio"] == last.max_vio
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [line["train/loss"] for line in lines] == losses
    means = [entry for entry in trainer.state.log_history if "moe/mean/used" in entry]
    assert [entry["step"] for entry in means] == [2, 4]
    events = EventAccumulator(str(tmp_path / "own"), size_guidance={"images": 0})
    events.Reload()
    used = [event.value for event in events.Scalars("train/moe/02/used")]
    np.testing.assert_allclose(used, [line["moe/02/used"] for line in lines])
    assert [image.step for image in events.Images("moe/load")] == [2, 4]
    assert "train/moe/02/gini" not in events.Tags()["scalars"]
    # what shows runs of ours
    question = {"run": ["mine"], "counted": ["training"], "window": ["1"]}
    shown = answers.window(Folder(tmp_path / "runs"), question)
    assert [layer["counts"] for layer in shown["layers"]] == by_step[1].tolist()
    assert main(["watch", str(tmp_path / "runs"), "--once"]) == 0
    table = capsys.readouterr().out
    assert "mine" in table
    assert "finished" in table
    assert "4/4" in table
    link_runs(tmp_path / "runs", tmp_path / "links")
    assert list((tmp_path / "links" / "mine").glob("*tfevents*"))


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_fine_tuning_of_trl_logs_the_counts_of_tokens_that_are_none_of_its_padding(
    recomputed: bool, tmp_path: Path
) -> None:
    # some seconds of imports
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    model = plain("mixtral")
    said, masks = said_by_routers(model), list[Tensor]()
    model.register_forward_pre_hook(
        lambda _, __, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    words = models.WordLevel({str(i): i for i in range(SHAPE["vocab_size"])}, unk_token="0")
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=3,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        activation_checkpointing=recomputed,
    )
    rows = [{"input_ids": row[: 20 - 3 * i].tolist()} for i, row in enumerate(tokens())]
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), eos_token="1", pad_token="2"
        ),
    )
    trainer.add_callback(UsageCallback(trainer, folder=tmp_path / "mine"))
    trainer.train()
    assert [int(mask.sum()) for mask in masks] == [20 + 17 + 14] * 2
    passes = len(said) // 2  # of routers in a step, LAYERS of them again where they are recomputed
    assert passes == LAYERS * (2 if recomputed else 1)
    by_step = [
        torch.stack([counted(ids, mask) for ids in said[i * passes :][:LAYERS]])
        for i, mask in enumerate(masks)
    ]
    saved = np.load(tmp_path / "mine" / "usage.npz")
    assert saved["steps"].tolist() == [1, 2]
    np.testing.assert_array_equal(saved["counts"], torch.stack(by_step).numpy())


class Broken(TensorBoardCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        del args, state, control, named
        if "moe/mean/used" in logs:
            raise OSError("no route to host")


def test_a_tracker_that_fails_is_named_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, plain("mixtral"), report_to=[])
    trainer.add_callback(Broken())
    trainer.add_callback(UsageCallback(trainer))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [record.message for record in caplog.records if "no route" in record.message]
    assert told == ["Broken gets no usage of experts any more: no route to host"]
    assert trainer.state.global_step == 4
