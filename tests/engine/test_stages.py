"""Every ZeRO stage trains the same, and goes on from what another one saved."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.sharding import is_sharded
from simvq_moe.engine.world import World, start_distributed
from simvq_moe.errors import ConfigError
from simvq_moe.runs.checkpoint import read_index
from simvq_moe.runs.chunks import read_whole
from simvq_moe.tasks.registry import build_model
from simvq_moe.training.loop import Trainer
from tests.launching import ROOT, metrics, on_ranks
from tests.short_training import short_samples

STEPS, SAVED = 4, 2
TEXT = (
    *("--task", "language_model", "--data.vocabulary", "300", "--data.context", "16"),
    *("--language_model.width", "18", "--language_model.heads", "3"),
    *("--language_model.layers", "2", "--moe.experts", "6", "--moe.top_k", "2"),
    *("--optimizer.weight_decay", "0.1", "--train.probe_tokens", "128"),
)
IMAGE = (
    *("--quantizer.codes", "16", "--quantizer.width", "5", "--image_tokenizer.hidden", "7"),
    # the second rank has no second batch
    *("--data.crops", "32", "--data.held_out_crops", "17", "--train.eval_batch_size", "8"),
)
RUNS = {
    "dense": (*TEXT, "--language_model.moe_every", "0", "--language_model.tied_head", "False"),
    "mixture": (*TEXT, "--moe.expert_out_map.kind", "linear", "--moe.balance.kind", "aux"),
    "simvq": IMAGE,
    "ema": (*IMAGE, "--quantizer.kind", "ema"),
}
SCHEDULE = (
    *("--train.batch_size", "8", "--train.accumulation", "2", "--train.clip", "0.4"),
    *("--optimizer.warmup_steps", "2", "--train.steps", str(STEPS), "--train.log_every", "1"),
    *("--train.eval_every", str(STEPS), "--train.save_every", str(SAVED)),
)
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""DeepSpeed keeps small parameters whole unless it is told otherwise."""
OFFLOADED = ROOT / "configs" / "deepspeed" / "offload_parameters.json"
"""What the single rank uses at stage 3 instead."""
LAYOUTS = [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1)]
"""ZeRO stage and number of ranks; compared with stage 1 on one rank."""
CHANGES = [(3, 1), (1, 3), (0, 3), (3, 0)]


def configured(folder: Path, run: str, stage: int, name: str, *, sharded: bool = True) -> Config:
    data = ("--data.source", str(folder / "corpus")) if run in ("dense", "mixture") else ()
    where = ("--data.cache_dir", str(folder / "cache"), "--runs_dir", str(folder), "--name", name)
    zero: tuple[str, ...] = ("--train.zero_stage", str(stage))
    if stage == 3:
        settings = folder / "sharded.json" if sharded else OFFLOADED
        zero += ("--train.deepspeed_config", str(settings))
    config = with_flags(Config(), (*RUNS[run], *SCHEDULE, *data, *where, *zero), "train")
    check(config)
    return config


def train(config: Config, world: World) -> Trainer:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with short_samples(), contextlib.closing(Trainer(config, world, lambda: False)) as trainer:
        trainer.run()
    if world.is_main:
        (config.run_dir / "config.yaml").write_text(to_yaml(config))
    return trainer


def go_on(folder: Path, run: str, before: str, after: int, world: World) -> None:
    """A copy of a run at another stage, from the checkpoint in its middle."""
    config = configured(folder, run, after, f"{before}_to_{after}_on_{world.size}")
    if world.is_main:
        shutil.copytree(folder / before, config.run_dir)
        shutil.rmtree(config.run_dir / "checkpoints" / str(STEPS))
    world.barrier()
    assert train(config, world).resumed_from == SAVED


def one_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        store = (folder / "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    world = start_distributed()
    for run in RUNS:
        for stage in [stage for stage, n in LAYOUTS if n == ranks] + [1] * (ranks == 1):
            name = f"{run}_{stage}_{ranks}"
            trainer = train(configured(folder, run, stage, name, sharded=ranks > 1), world)
            if stage == 3 and ranks > 1:
                note(trainer, folder / f"{run}_{rank}.json")
    if ranks > 1:
        for before, after in CHANGES:
            go_on(folder, "mixture", f"mixture_{before}_2", after, world)
        go_on(folder, "ema", "ema_3_2", 1, world)
        (folder / f"not_finite_{rank}.json").write_text(json.dumps(norm_of_bad_latents(world)))
    else:
        go_on(folder, "mixture", "mixture_3_2", 1, world)
    dist.destroy_process_group()


def note(trainer: Trainer, path: Path) -> None:
    """How much of the parameters a rank holds between two steps, and of how much."""
    parameters: list[Any] = list(trainer.task.model.parameters())
    held = sum(p.numel() + p.ds_tensor.numel() for p in parameters)
    path.write_text(json.dumps({"held": held, "all": sum(p.ds_numel for p in parameters)}))


def norm_of_bad_latents(world: World) -> list[float]:
    """Loss and gradient norm after a step in which the last rank's images are not finite."""
    config = with_flags(Config(), (*IMAGE, "--train.zero_stage", "3"), "train")
    engine = make_engine(build_model(config), config, world)
    images = torch.rand(config.train.batch_size // world.size, 3, 32, 32)
    loss, _ = engine(images * (torch.nan if world.rank == world.size - 1 else 1))
    engine.backward(loss)
    engine.step()
    return [float(loss), float(engine.get_global_grad_norm())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs. Stage 3 replaces functions of torch, so none of them is in this process."""
    root = tmp_path_factory.mktemp("stages")
    (root / "corpus").mkdir()
    for i, file in enumerate(sorted((ROOT / "tests" / "core").glob("*.py"))):
        (root / "corpus" / f"{i}.py").write_text(file.read_text())
    (root / "sharded.json").write_text(json.dumps(SHARDED))
    for ranks in (2, 1):
        on_ranks(one_rank, ranks, root, ranks=ranks)
    return root


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and Adam's moments at the end."""
    saved = run_dir / "checkpoints" / str(STEPS)
    return dict(read_whole(saved, read_index(saved).tensors))


def assert_same(run_dir: Path, reference: Path) -> None:
    """At the tolerances of float32, for sums over ranks and shards round in another order."""
    lines, expected = metrics(run_dir), metrics(reference)
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
            if name in line:
                assert_close(torch.tensor(line[name]), torch.tensor(other[name]))
    assert_close(tensors(run_dir), tensors(reference))


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_stages_give_the_same_losses_norms_and_parameters(folder: Path, run: str) -> None:
    reference = folder / f"{run}_1_1"
    norms = [line["train/grad_norm"] for line in metrics(reference)]
    assert max(norms) > 0.4, "nothing is clipped"
    for stage, ranks in LAYOUTS:
        assert_same(folder / f"{run}_{stage}_{ranks}", reference)


@pytest.mark.distributed
def test_a_checkpoint_of_one_stage_goes_on_at_another(folder: Path) -> None:
    for before, after in CHANGES:
        assert_same(folder / f"mixture_{before}_2_to_{after}_on_2", folder / "mixture_1_1")
    assert_same(folder / "mixture_3_2_to_1_on_1", folder / "mixture_1_1")
    assert_same(folder / "ema_3_2_to_1_on_2", folder / "ema_1_1")


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_at_stage_3_each_rank_holds_its_share_of_the_parameters(folder: Path, run: str) -> None:
    for rank in range(2):
        held = json.loads((folder / f"{run}_{rank}.json").read_text())
        # shares are filled up to equal sizes
        assert held["all"] / 2 <= held["held"] < 0.55 * held["all"]


@pytest.mark.distributed
def test_at_stage_3_latents_that_are_not_finite_leave_no_rank_waiting(folder: Path) -> None:
    (good, *norms), (bad, *others) = (
        json.loads((folder / f"not_finite_{rank}.json").read_text()) for rank in range(2)
    )
    assert good == good
    assert bad != bad
    assert [*norms, *others] == [float("inf")] * 2


@pytest.mark.distributed
def test_a_run_at_stage_3_is_evaluated_folded_and_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "mixture_3_2"
    assert main(["eval", str(run), "--cache_dir", str(tmp_path / "cache")]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert_close(measured["val/loss"], metrics(run)[-1]["val/loss"], rtol=1e-6, atol=0)
    assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 0
    assert "outputs differ by" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "def ", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_below_stage_3_nothing_is_sharded(world: World) -> None:
    model = build_model(with_flags(Config(), IMAGE, "train"))
    make_engine(model, with_flags(Config(), IMAGE, "train"), world)
    assert not any(is_sharded(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("0", "--train.dtype", "bf16"), "'bf16': DeepSpeed's optimizer there takes a step before"),
        (("0", "--train.dtype", "fp16"), "'fp16': DeepSpeed's optimizer there takes a step before"),
        (("0", "--moe.expert_parallel", "2"), "norm there leaves out the experts of other ranks"),
        (("0", "--train.on_not_finite", "skip"), "steps there whatever the gradients are"),
        (("3", "--moe.expert_parallel", "2"), "shards no parameters of such experts"),
        (("3", "--moe.dispatch", "deepspeed_capacity"), "shards no parameters of such experts"),
        (("3", "--train.compile", "True"), "compiled blocks would keep gathered parameters"),
    ],
)
def test_what_a_stage_gets_wrong_is_refused(flags: tuple[str, ...], message: str) -> None:
    config = with_flags(Config(), (*TEXT, "--train.zero_stage", *flags), "train")
    with pytest.raises(ConfigError, match=f"train.zero_stage {flags[0]} with .*{message}.*: use"):
        check(config)


@pytest.mark.parametrize("task", ["image_tokenizer", "audio_tokenizer"])
def test_stage_3_refuses_discriminators(task: str) -> None:
    flags = ("--task", task, f"--{task}.adversarial_weight", "1", "--train.zero_stage", "3")
    with pytest.raises(ConfigError, match=f"with {task}.adversarial_weight 1.0: DeepSpeed can't"):
        check(with_flags(Config(), flags, "train"))
