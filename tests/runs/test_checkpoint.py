"""Checkpoints are whole or not there, and go on with any ranks, ZeRO stage and split of experts."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.runs import checkpoint
from simvq_moe.runs.chunks import read_whole
from simvq_moe.training.loop import Trainer
from simvq_moe.training.preflight import check_launch
from tests.two_ranks import TwoRanks

TINY = (
    *("--quantizer.codes", "16", "--quantizer.width", "4", "--image_tokenizer.hidden", "4"),
    *("--data.crops", "64", "--data.held_out_crops", "18", "--train.batch_size", "4"),
    *("--train.save_every", "1", "--train.probe_tokens", "0"),
)
TEXT = (
    *("--task", "language_model", "--data.vocabulary", "300", "--data.context", "16"),
    *("--language_model.width", "16", "--language_model.heads", "2"),
    *("--language_model.layers", "2", "--moe.experts", "8", "--moe.top_k", "2"),
    *("--moe.expert_out_map.kind", "linear", "--moe.expert_in_map.kind", "separate"),
    *(
        "--moe.router.map.kind",
        "linear",
        "--moe.balance.kind",
        "aux",
        "--optimizer.weight_decay",
        "0.1",
    ),
    *("--optimizer.map_lr_multiplier", "2", "--optimizer.warmup_steps", "4"),
    *("--train.batch_size", "8", "--train.accumulation", "2", "--train.clip", "0.5"),
    *("--train.steps", "8", "--train.save_every", "4", "--train.probe_tokens", "0"),
)
FROZEN = (
    *("--moe.expert_in_map.train_base", "False", "--moe.expert_out_map.train_base", "False"),
    *("--moe.expert_in_map.kind", "none"),
)
OFFLOAD = "offload.json"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "two ranks": (2, ()),
    "ZeRO 2": (2, ("--train.zero_stage", "2")),
    "split experts": (2, ("--moe.expert_parallel", "2")),
    "offloaded": (2, ("--train.deepspeed_config", OFFLOAD)),
    "bf16 one rank": (1, ("--train.dtype", "bf16")),
    "bf16": (2, ("--train.dtype", "bf16")),
    "frozen one rank": (1, FROZEN),
    "frozen split experts": (2, (*FROZEN, "--moe.expert_parallel", "2")),
}
"""Number of ranks and flags."""
CHANGES = [
    ("two ranks", "one rank"),
    ("split experts", "one rank"),
    ("bf16", "bf16 one rank"),
    ("frozen split experts", "frozen one rank"),
    ("one rank", "split experts"),
    ("two ranks", "ZeRO 2"),
    ("ZeRO 2", "offloaded"),
    ("split experts", "two ranks"),
    ("bf16 one rank", "bf16"),
    ("frozen one rank", "frozen split experts"),
]


def configured(run_dir: Path, *flags: str) -> Config:
    folder = run_dir.parent
    data = ("--data.source", str(folder / "corpus"), "--data.cache_dir", str(folder / "cache"))
    flags = (*TEXT, *data, *flags, "--runs_dir", str(folder), "--name", run_dir.name)
    flags = tuple(str(folder / flag) if flag == OFFLOAD else flag for flag in flags)
    return with_flags(Config(), flags, "train")


def advance(config: Config, world: World, steps: int) -> Trainer:
    """A run, or the rest of it, up to this step, which is saved; its records are open."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, world, lambda: False)
    while trainer.step < steps:
        trainer.update()
        if trainer.step % config.train.save_every == 0:
            trainer.save()
    return trainer


def train(config: Config, world: World, steps: int) -> Trainer:
    trainer = advance(config, world, steps)
    trainer.close()
    return trainer


def path(folder: Path, before: str, after: str | None = None) -> Path:
    name = before if after is None else f"{before} to {after}"
    return folder / name.replace(" ", "_")


def begin(folder: Path, world: World) -> None:
    """Every layout of this many ranks, to the end."""
    for name, (ranks, flags) in LAYOUTS.items():
        if ranks == world.size and name != "offloaded":
            finish(configured(path(folder, name), *flags), world)


def go_on(folder: Path, world: World) -> None:
    """Every change to a layout of this many ranks, from step 4."""
    for before, after in CHANGES:
        ranks, flags = LAYOUTS[after]
        if ranks == world.size:
            config = configured(path(folder, before, after), *flags)
            if world.is_main:
                shutil.copytree(path(folder, before), config.run_dir)
                shutil.rmtree(config.run_dir / "checkpoints" / "8")
            world.barrier()
            assert finish(config, world).resumed_from == 4


def finish(config: Config, world: World) -> Trainer:
    """All steps as one window, in the middle of which lies a checkpoint."""
    trainer = advance(config, world, 8)
    metrics = trainer.write_log()
    trainer.close()
    if world.is_main:
        (config.run_dir / "window.json").write_text(json.dumps(metrics))
    return trainer


def on_one_of_two(world: World, folder: Path) -> None:
    begin(folder, world)
    go_on(folder, world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world: World, two_ranks: TwoRanks) -> Path:
    """Runs of every layout, and what became of them after every change."""
    root = tmp_path_factory.mktemp("layouts")
    (root / "corpus").mkdir()
    for i, file in enumerate(sorted(Path(__file__).parent.glob("*.py"))):
        (root / "corpus" / f"{i}.py").write_text(file.read_text())
    offload = {"offload_optimizer": {"device": "cpu"}}
    settings = {"zero_optimization": offload, "zero_force_ds_cpu_optimizer": False}
    (root / OFFLOAD).write_text(json.dumps(settings))
    begin(root, world)
    two_ranks(on_one_of_two, root)
    go_on(root, world)
    return root


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_in_another_layout_as_it_would_have(
    folder: Path, before: str, after: str
) -> None:
    whole, changed = (
        json.loads((run / "window.json").read_text())
        for run in (path(folder, before), path(folder, before, after))
    )
    assert set(changed) == set(whole)
    assert changed["train/lr"] == whole["train/lr"]
    # sums over ranks round differently: to 24 bits, or to bf16's 8
    close = 1e-3 if "bf16" in before else 1e-6
    for name in ("train/loss", "train/grad_norm"):
        assert_close(changed[name], whole[name], rtol=close, atol=close)
    if "bf16" not in before:
        for name in (name for name in whole if name.startswith("moe/")):
            assert changed[name] == whole[name]
        assert changed["bank/00/staleness"] == whole["bank/00/staleness"]


@pytest.mark.distributed
def test_layouts_write_the_same_tensors(folder: Path) -> None:
    def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
        saved = run_dir / "checkpoints" / "8"
        return dict(read_whole(saved, checkpoint.read_index(saved).tensors))

    one = tensors(path(folder, "one rank"))
    assert all(tensor.dtype == torch.float32 for tensor in one.values())
    runs = [path(folder, name) for name in ("two ranks", "ZeRO 2", "split experts")]
    for run_dir in (*runs, path(folder, "ZeRO 2", "offloaded")):
        found = tensors(run_dir)
        assert set(found) == set(one)
        # Adam divides by what is nearly zero, so that rounding grows
        assert_close(found, one, rtol=1e-3, atol=1e-4)


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    cache = ("--data.cache_dir", str(tmp_path / "cache"))
    return with_flags(Config(), (*TINY, *cache, "--runs_dir", str(tmp_path)), "train")


def may_write(function: Any) -> bool:
    """Whether a function out of Python can change a file: one of the system, or a file's own."""
    return function.__module__ in ("posix", "io", "_io") or isinstance(
        getattr(function, "__self__", None), io.IOBase
    )


def call(work: Callable[[Any], Any], argument: Any) -> None:
    work(argument)


@pytest.mark.parametrize("async_save", [False, True])
def test_every_moment_of_a_save_leaves_a_checkpoint_to_go_on_from(
    tiny: Config, world: World, tmp_path: Path, *, async_save: bool
) -> None:
    train_config = replace(tiny.train, keep_checkpoints=1, async_save=async_save)
    trainer = advance(replace(tiny, train=train_config), world, steps=1)
    moments: list[Path] = []
    seen: list[list[tuple[str, int]]] = []

    def watch(frame: FrameType, event: str, function: Any) -> None:
        """What a kill before or after any call out of Python would leave."""
        del frame
        if event in ("c_call", "c_return") and may_write(function):
            files = sorted(trainer.checkpoints.rglob("*"))
            state = [(str(p), p.stat().st_size if p.is_file() else 0) for p in files]
            if not seen or seen[-1] != state:
                seen.append(state)
                moments.append(tmp_path / "moments" / str(len(moments)))
                shutil.copytree(trainer.checkpoints, moments[-1])

    trainer.update()
    thread = trainer.saves.thread  # None: this one writes
    (thread.submit if thread else call)(sys.setprofile, watch)
    trainer.save()
    (thread.submit if thread else call)(sys.setprofile, None)
    trainer.close()
    steps = [checkpoint.latest_step(moment) for moment in moments]
    assert steps == sorted(steps, key=lambda step: step or 0)
    assert set(steps) == {1, 2}
    # temporary folder, six files in parts, manifest, rename, note, deletion in parts
    assert len(moments) > 12
    for moment, step in zip(moments, steps, strict=True):
        assert_close(
            checkpoint.load_weights(moment / str(step)),
            checkpoint.load_weights((moments[0] if step == 1 else moments[-1]) / str(step)),
            rtol=0,
            atol=0,
        )
    # and what a kill has left behind is no hindrance
    unfinished = next(m for m in moments if (m / "2.tmp" / "manifest.json").exists())
    shutil.rmtree(trainer.checkpoints)
    shutil.copytree(unfinished, trainer.checkpoints)
    again = Trainer(replace(tiny, train=train_config), world, lambda: False)
    assert again.resumed_from == 1
    again.update()
    again.save()
    again.close()
    names = sorted(p.name for p in trainer.checkpoints.iterdir())
    assert names == ["2", "latest"]


def test_the_last_and_those_of_every_so_many_steps_are_kept(tiny: Config, world: World) -> None:
    config = replace(tiny, train=replace(tiny.train, keep_checkpoints=2, keep_every=3))
    trainer = train(config, world, steps=8)
    assert checkpoint.committed_steps(trainer.checkpoints) == [3, 6, 7, 8]


def test_a_broken_later_checkpoint_does_not_take_the_place_of_a_whole_one(
    tiny: Config, world: World
) -> None:
    config = replace(tiny, train=replace(tiny.train, save_every=2, keep_checkpoints=1))
    trainer = train(config, world, steps=6)
    shutil.copytree(trainer.checkpoints / "6", trainer.checkpoints / "7")
    (trainer.checkpoints / "7" / "model_0.safetensors").unlink()
    others = [trainer.checkpoints / name for name in ("007", "mine.tmp")]
    for other in others:
        other.mkdir()
    trainer.save()
    assert checkpoint.committed_steps(trainer.checkpoints) == [6]
    assert all(other.is_dir() for other in others)


def test_random_numbers_go_on_with_as_many_ranks_and_start_again_with_others(
    tiny: Config, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(tiny, world, steps=3)
    expected = torch.rand(4)
    Trainer(tiny, world, lambda: False).close()
    assert_close(torch.rand(4), expected, rtol=0, atol=0)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    # as if two ranks had written it
    target = trainer.checkpoints / "3"
    manifest = json.loads((target / "manifest.json").read_text())
    files = manifest["files"] | {"rank_1.pt": manifest["files"]["rank_0.pt"]}
    manifest |= {"world_size": 2, "files": files}
    (target / "manifest.json").write_text(json.dumps(manifest))
    shutil.copyfile(target / "rank_0.pt", target / "rank_1.pt")
    drawn = []
    for _ in range(2):
        Trainer(tiny, world, lambda: False).close()
        drawn.append(torch.rand(4))
    assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    assert not torch.equal(drawn[0], expected)
    assert "was written by 2 ranks and goes on with 1 rank" in caplog.text


COUNTERS = ("global_steps", "global_samples", "skipped_steps", "optimizer_step", "schedule_step")


def write_checkpoint(folder: Path, step: int) -> Path:
    target = folder / str(step)
    target.mkdir(parents=True)
    (target / "model_0.safetensors").write_bytes(b"12345")
    manifest = {
        "format": checkpoint.FORMAT,
        "step": step,
        "world_size": 1,
        "counters": dict.fromkeys(COUNTERS, step) | {"loss_scale": {}},
        "files": {"model_0.safetensors": {"size": 5}},
    }
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_the_latest_whole_checkpoint_is_the_newest_whose_files_are_all_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoint.latest_step(tmp_path) is None
    for step in (10, 9, 100, 20, 30):
        write_checkpoint(tmp_path, step)
    (tmp_path / "300.tmp").mkdir()
    assert checkpoint.latest_step(tmp_path) == 100
    assert not caplog.records
    (tmp_path / "100" / "model_0.safetensors").write_bytes(b"123")
    assert checkpoint.latest_step(tmp_path) == 30
    (tmp_path / "30" / "model_0.safetensors").write_bytes(b"")
    assert checkpoint.latest_step(tmp_path) == 20
    (tmp_path / "20" / "model_0.safetensors").unlink()
    assert checkpoint.latest_step(tmp_path) == 10
    (tmp_path / "10" / "manifest.json").write_text('{"format": "who')
    caplog.clear()
    assert checkpoint.latest_step(tmp_path) == 9
    messages = "\n".join(record.getMessage() for record in caplog.records)
    for step, words in (
        (100, "model_0.safetensors is missing or has another size"),
        (30, "model_0.safetensors is missing or has another size"),
        (20, "model_0.safetensors is missing"),
        (10, "its manifest.json is missing or not readable"),
    ):
        assert f"checkpoint {tmp_path / str(step)} is skipped: {words}" in messages


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(("model_0.safetensors", -1), ("optimizer_0.safetensors", -1), ("index.json", 200)),
        *(("trainer.pt", 100), ("rank_0.pt", 100)),
    ],
)
def test_a_checkpoint_with_another_content_is_skipped_for_the_one_before(
    tiny: Config, world: World, caplog: pytest.LogCaptureFixture, name: str, at: int
) -> None:
    config = replace(tiny, train=replace(tiny.train, keep_checkpoints=2))
    trainer = train(config, world, steps=2)
    before = checkpoint.load_weights(trainer.checkpoints / "1")
    spoil(trainer.checkpoints / "2" / name, at)
    assert checkpoint.latest_step(trainer.checkpoints) == 2  # no content is read for that
    again = Trainer(config, world, lambda: False)
    again.close()
    assert again.resumed_from == 1
    assert_close(dict(again.task.model.state_dict()), before, rtol=0, atol=0)
    said = f"checkpoint {trainer.checkpoints / '2'} is skipped: {name} has another content than"
    assert said in caplog.text
    if name in ("model_0.safetensors", "index.json"):  # all that weights are read from
        caplog.clear()
        assert_close(checkpoint.newest_weights(trainer.checkpoints), before, rtol=0, atol=0)
        assert said in caplog.text
    spoil(trainer.checkpoints / "1" / name, at)
    with pytest.raises(ConfigError, match=f"no checkpoint in .* is as it was written .*{name}.*:"):
        Trainer(config, world, lambda: False)


def spoil(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "old",
    [
        {"step": 5, "world_size": 2, "files": {"mp_rank_00_model_states.pt": 5}},
        {"format": "whole tensors 1", "step": 5, "files": {"model_0.safetensors": {"size": 5}}},
    ],
)
def test_a_checkpoint_of_another_form_is_refused_in_one_line(
    tiny: Config, old: dict[str, Any]
) -> None:
    target = write_checkpoint(tiny.run_dir / "checkpoints", 5)
    (target / "manifest.json").write_text(json.dumps(old))
    (tiny.run_dir / "config.yaml").write_text(to_yaml(tiny))
    with pytest.raises(ConfigError, match="5 has another form than this version reads: use") as one:
        checkpoint.latest_step(tiny.run_dir / "checkpoints")
    assert "\n" not in str(one.value)
    with pytest.raises(ConfigError, match="has another form"):
        check_launch(tiny, 1)


def test_a_checkpoint_of_another_model_is_refused_by_name(tiny: Config, world: World) -> None:
    train(tiny, world, steps=1)
    other = replace(tiny, quantizer=replace(tiny.quantizer, bias=True))
    with pytest.raises(ConfigError, match=r"checkpoint .*/1 lacks .*bias: use the version that"):
        Trainer(other, world, lambda: False)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (("--train.zero_stage", "2"), False),
        (("--train.log_every", "3", "--train.eval_every", "5", "--train.save_every", "7"), False),
        (("--train.on_not_finite", "skip", "--train.timeout_s", "60"), False),
        (("--train.steps", "900"), False),
        (("--train.accumulation", "2"), True),
    ],
)
def test_only_the_layout_of_a_run_may_change(
    tiny: Config, flags: tuple[str, ...], refused: bool
) -> None:
    tiny.run_dir.mkdir()
    (tiny.run_dir / "config.yaml").write_text(to_yaml(tiny))
    changed = with_flags(tiny, flags, "train")
    if refused:
        with pytest.raises(ConfigError, match=r"another config \(train.accumulation was 1"):
            check_launch(changed, 2)
    else:
        check_launch(changed, 2)


def test_experts_may_be_split_over_another_number_of_ranks(tmp_path: Path) -> None:
    text = with_flags(Config(), (*TEXT, "--runs_dir", str(tmp_path)), "train")
    text.run_dir.mkdir()
    (text.run_dir / "config.yaml").write_text(to_yaml(text))
    check_launch(with_flags(text, ("--moe.expert_parallel", "2"), "train"), 2)
