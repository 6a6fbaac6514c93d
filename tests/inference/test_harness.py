"""Tasks of lm-eval on a run: a local one against the model's own likelihoods."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simvq_moe.analysis.results import ArmResult, GroupResult
from simvq_moe.cli import main
from simvq_moe.data.text.tokenizer import encode_text, load_tokenizer
from simvq_moe.inference.harness import join_summary, measures_of
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.records.catalogue import directed
from simvq_moe.records.printing import number
from simvq_moe.reports.tables import task_table
from simvq_moe.tasks.loading import load_model
from tests.inference.test_export import run_of

QUESTIONS = [
    {"question": "to be or not", "choices": [" to be", " suffer"], "answer": 0},
    {"question": "whether 'tis", "choices": [" to be", " nobler"], "answer": 1},
    {"question": "that is the", "choices": [" or", " question"], "answer": 1},
]


def task_file(folder: Path) -> Path:
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    lines = [
        "task: hamlet",
        "dataset_path: json",
        "dataset_kwargs:",
        "  data_files:",
        f"    test: {folder / 'questions.jsonl'}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{question}}"',
        'doc_to_choice: "{{choices}}"',
        'doc_to_target: "{{answer}}"',
        'target_delimiter: ""',
        "metric_list:",
        "  - metric: acc",
    ]
    (folder / "hamlet.yaml").write_text("\n".join(lines) + "\n")
    return folder / "hamlet.yaml"


def accuracy(run: Path) -> float:
    config, model = load_model(run)
    assert isinstance(model, LanguageModel)
    tokenizer = load_tokenizer(str(run / "tokenizer.json"), config.data.vocabulary)
    right = 0
    for example in QUESTIONS:
        context = encode_text(tokenizer, str(example["question"]))
        scores = []
        for choice in example["choices"]:  # pyright: ignore[reportGeneralTypeIssues]
            whole = encode_text(tokenizer, f"{example['question']}{choice}")
            with torch.no_grad():
                logits, _ = model.logits(torch.tensor([whole[:-1]]))
            told = logits[0].log_softmax(-1)[range(len(whole) - 1), whole[1:]]
            scores.append(float(told[len(context) - 1 :].sum()))
        right += scores.index(max(scores)) == example["answer"]
    return right / len(QUESTIONS)


def test_a_local_task_measures_what_the_model_says_and_joins_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = run_of(tmp_path / "run")
    (run / "summary.json").write_text('{"status": "finished", "val/loss": 1.5, "step": 6.0}')
    assert main(["eval", str(run), "--tasks", str(task_file(tmp_path))]) == 0
    expected = {"eval/hamlet/acc": accuracy(run)}
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)
    summary = json.loads((run / "summary.json").read_text())
    assert summary == pytest.approx({"status": "finished", "val/loss": 1.5, "step": 6.0} | expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "arc_easy"), "pip install 'simvq-moe[eval]'"),
        (("--tasks", " , "), "--tasks names no task"),
        (("--tasks", "arc_easy", "--data", "x"), "--data with --tasks"),
        (("--limit", "3"), "--limit 3 is for --tasks"),
    ],
)
def test_what_can_not_be_evaluated_is_refused_in_a_line(
    flags: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


def test_numbers_are_called_by_task_and_measure() -> None:
    numbers = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "hamlet", "f1,strict": 1}
    assert measures_of({"a b": numbers}) == {"eval/a_b/acc": 0.5, "eval/a_b/f1_strict": 1.0}


def test_a_task_replaces_its_own_measures_in_the_summary_and_in_tensorboard(
    tmp_path: Path,
) -> None:
    summary = {"status": "finished", "step": 6.0, "val/loss": 1.5, "eval/b/acc": 0.25}
    summary |= {"eval/a/acc": 0.5, "eval/a/f1": 0.5, "eval/ab/acc": 1.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "tensorboard").mkdir()
    for acc in (0.6, 0.75):
        join_summary(tmp_path, {"eval/a/acc": acc, "eval/c/acc": 0.1})
    expected = {name: value for name, value in summary.items() if name != "eval/a/f1"}
    expected |= {"eval/a/acc": 0.75, "eval/c/acc": 0.1}
    assert json.loads((tmp_path / "summary.json").read_text()) == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {f"eval/{task}/acc" for task in ("a", "ab", "b", "c")}
    assert [(e.step, e.value) for e in events.Scalars("eval/a/acc")] == [(6, 0.75)]


def test_measures_of_tasks_are_in_the_catalogue_and_in_the_report() -> None:
    assert directed("eval/arc_easy/acc_norm") == "arc_easy normalized accuracy ↑"
    assert directed("eval/mine/my_f1") == "mine my f1"
    assert number("eval/arc_easy/acc", 0.5) == "50.0 %"
    values = {"eval/hamlet/acc": [0.25, None], "eval/hamlet/my_f1": [None, 2.0], "val/loss": [1.0]}
    mean = {"eval/hamlet/acc": 0.25, "eval/hamlet/my_f1": 2.0}
    spread = dict.fromkeys(mean, math.nan)
    arm = ArmResult("plain", "plain", False, True, 2, ["finished"], values, mean, spread, {})
    texts = dict.fromkeys(("name", "sweep", "question", "notes", "config", "command"), "")
    lists: dict[str, list[Any]] = {
        field.name: [] for field in fields(GroupResult) if str(field.type).startswith("list")
    }
    numbers: dict[str, Any] = {"kind": None, "baseline": "plain", "primary": {}, "pairs_needed": 0}
    table = task_table(GroupResult(**texts, **lists | {"arms": [arm]}, **numbers))
    assert table.header == ["arm", "hamlet accuracy", "hamlet my f1"]
