"""The probe sees what the routers do, leaves no trace in the run, and is resumed exactly."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.testing import assert_close

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config, DataConfig, LanguageModelConfig, MoEConfig, TrainConfig
from simvq_moe.core.usage import counters
from simvq_moe.data.text.tokens import TokenWindows
from simvq_moe.engine.world import World
from simvq_moe.moe import MoE
from simvq_moe.moe.expert_kinds import SwiGLUExpert
from simvq_moe.moe.maps import LinearMap, SeparateMaps
from simvq_moe.moe.routers.base import Routing
from simvq_moe.moe.routers.expert_choice import ExpertChoiceOptions
from simvq_moe.moe.routing_measures import (
    confidence,
    fluctuation,
    importance_cv2,
    information,
    label_counts,
    saturation,
)
from simvq_moe.runs.counts import read_probe
from simvq_moe.tasks.probe_tokens import choose_tokens
from simvq_moe.tasks.registry import AnyTask, build_task
from simvq_moe.training.loop import Trainer
from simvq_moe.training.probe import Probe
from tests.launching import metrics
from tests.short_training import train_flags, train_two_steps
from tests.two_ranks import TwoRanks

EXPERTS, LAYERS, CONTEXT = 6, 2, 8
MEASURES = {
    *("router_entropy", "confidence", "boundary_margin", "importance_cv2", "co_activation"),
    *("token_information", "domain_information", "output_similarity"),
    *("input_rank", "input_condition", "input_mean_share", "logits_rank", "row_exponent"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two domains, and so few documents that the end of each is held out."""
    root = tmp_path_factory.mktemp("probe")
    for domain in ("red", "blue"):
        (root / "corpus" / domain).mkdir(parents=True)
        for i in range(9):
            numbers = np.random.default_rng(i).integers(1000, size=200)
            text = " ".join(f"{domain}{n}" for n in numbers)
            (root / "corpus" / domain / f"{i}.txt").write_text(text)
    return root


def config(folder: Path, **moe: Any) -> Config:
    settings: dict[str, Any] = {"experts": EXPERTS, "top_k": 2, "hidden": 8} | moe
    return Config(
        task="language_model",
        data=DataConfig(
            source=str(folder / "corpus"),
            vocabulary=300,
            context=CONTEXT,
            cache_dir=str(folder / "cache"),
        ),
        moe=MoEConfig(**settings),
        language_model=LanguageModelConfig(width=16, layers=LAYERS, heads=2),
        train=TrainConfig(batch_size=4, probe_tokens=160, eval_batch_size=8),
    )


def probe_of(task: AnyTask, folder: Path, world: World, step: int = 0, **train: Any) -> Probe:
    settings = replace(TrainConfig(probe_tokens=160, eval_batch_size=8), **train)
    return Probe(task, settings, world, folder, step)


def shake(task: AnyTask) -> None:
    """As if it had been trained: every weight moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in task.model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)


def kept_steps(run: Path) -> list[int]:
    probe = read_probe(run)
    assert probe is not None
    return probe["steps"].tolist()


def moe_layers(task: AnyTask) -> list[MoE]:
    return [module for module in task.model.modules() if isinstance(module, MoE)]


@torch.no_grad()
def routings(task: AnyTask, windows: Tensor) -> list[Routing]:
    """Of all windows at once, as the routers themselves say."""
    found: list[Routing] = []

    def remember(_: nn.Module, __: Any, routing: Any) -> None:
        found.append(routing)

    hooks = [layer.router.register_forward_hook(remember) for layer in moe_layers(task)]
    task.model.eval()
    task.evaluate(windows)
    for hook in hooks:
        hook.remove()
    return found


def test_probe_tokens_are_spread_over_the_held_out_set_and_always_the_same(folder: Path) -> None:
    held_out = build_task(config(folder)).held_out
    assert isinstance(held_out, TokenWindows)
    tokens = choose_tokens(held_out, 5 * CONTEXT)
    places = np.linspace(0, len(held_out) - 1, 5).round().astype(int)
    assert_close(tokens.windows, held_out.batch(places))
    assert_close(tokens.windows, choose_tokens(held_out, 5 * CONTEXT + 1).windows)
    domains = held_out.domains_of(places)
    assert domains is not None
    assert held_out.domains is not None
    expected = [held_out.domains.names[i] for i in domains.flatten()]
    assert [tokens.names[i] for i in tokens.domains] == expected
    assert len(choose_tokens(held_out, 10**6).windows) == len(held_out)


def test_measures_are_those_of_what_the_routers_chose(
    folder: Path, tmp_path: Path, world: World
) -> None:
    task = build_task(config(folder))
    shake(task)
    probe = probe_of(task, tmp_path, world)
    found = probe.measure(10)
    tokens = probe.tokens
    expected = routings(task, tokens.windows)
    for i, r in enumerate(expected):
        name = f"val/moe/{i:02d}"
        assert_close(found[f"{name}/confidence"], confidence(r.logits))
        assert_close(found[f"{name}/importance_cv2"], importance_cv2(r.gates, r.ids, EXPERTS))
        of_domains = information(r.ids, tokens.domains, EXPERTS)
        assert found[f"{name}/domain_information"] == of_domains
        of_tokens = information(r.ids, tokens.windows[:, :-1].flatten(), EXPERTS)
        assert found[f"{name}/token_information"] == of_tokens
    names = {name for name in found if name.startswith("val/moe/mean/")}
    assert names == {f"val/moe/mean/{m}" for m in MEASURES}
    each = [found[f"val/moe/{i:02d}/confidence"] for i in range(LAYERS)]
    assert_close(found["val/moe/mean/confidence"], sum(each) / LAYERS)
    probe.write()
    with np.load(tmp_path / "probe.npz") as saved:
        np.testing.assert_array_equal(saved["ids"][0], np.stack([r.ids for r in expected]))
        counts = [label_counts(r.ids, tokens.domains, EXPERTS, 2).numpy() for r in expected]
        np.testing.assert_array_equal(saved["domain_counts"][0], np.stack(counts))
        np.testing.assert_array_equal(saved["token_ids"], tokens.windows[:, :-1].flatten())
        assert set(saved["domain_names"]) == {"red", "blue"}
        assert saved["ids"].dtype == np.int8


def test_the_size_of_batches_changes_nothing(folder: Path, tmp_path: Path, world: World) -> None:
    task = build_task(config(folder))
    one, many = (probe_of(task, tmp_path, world, eval_batch_size=n).measure(1) for n in (3, 100))
    assert_close(one, many)


def test_the_probe_leaves_counts_random_numbers_and_methods_as_they_were(
    folder: Path, tmp_path: Path, world: World
) -> None:
    task = build_task(config(folder))
    task.model.train()
    task.model(task.held_out.batch(np.arange(4)))
    counts = [counter.counts.clone() for counter in counters(task.model)]
    weights = {name: w.clone() for name, w in task.model.state_dict().items()}
    random = torch.get_rng_state()
    probe_of(task, tmp_path, world).measure(1)
    assert_close(torch.get_rng_state(), random)
    assert_close([counter.counts for counter in counters(task.model)], counts)
    assert_close(dict(task.model.state_dict()), weights)
    assert not any(layer._forward_hooks for layer in moe_layers(task))


@pytest.fixture
def followed(folder: Path, tmp_path: Path, world: World) -> tuple[AnyTask, Probe]:
    """A probe with three evaluations, each of other weights."""
    task = build_task(config(folder))
    probe = probe_of(task, tmp_path, world)
    for step in (10, 20, 30):
        probe.measure(step)
        shake(task)
    probe.write()
    return task, probe


def test_fluctuation_and_saturation_compare_evaluations(
    followed: tuple[AnyTask, Probe], tmp_path: Path
) -> None:
    _, probe = followed
    with np.load(tmp_path / "probe.npz") as saved:
        ids = torch.from_numpy(saved["ids"]).long()
        settled = saved["saturation"]
    for t in range(3):
        each = [saturation(ids[t, layer], ids[2, layer]) for layer in range(LAYERS)]
        np.testing.assert_array_equal(settled[t], each)
    assert probe.saturations() == {
        "val/moe/mean/saturation_at/10": settled[0].mean(),
        "val/moe/mean/saturation_at/20": settled[1].mean(),
    }
    assert 0 < settled[0].mean() < 1
    now = probe.measure(40)
    latest = torch.from_numpy(probe.evaluations[-1].ids).long()
    assert now["val/moe/01/fluctuation"] == fluctuation(latest[1], ids[2, 1])
    assert now == probe.measure(40), "measured again at the same step"


def test_a_resumed_probe_keeps_what_came_before_its_checkpoint(
    followed: tuple[AnyTask, Probe], tmp_path: Path, world: World
) -> None:
    task, probe = followed
    whole = probe.measure(40)
    resumed = probe_of(task, tmp_path, world, step=30)
    assert resumed.measure(40) == whole
    again = probe_of(task, tmp_path, world, step=20)
    assert [e.step for e in again.evaluations] == [10, 20]
    assert kept_steps(tmp_path) == [10, 20, 30]
    assert probe_of(task, tmp_path, world).evaluations == []


def test_evaluations_are_lost_with_a_line_where_the_file_is_not_of_the_run(
    followed: tuple[AnyTask, Probe],
    tmp_path: Path,
    world: World,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, file = followed[0], tmp_path / "probe.npz"
    with np.load(file) as saved:
        kept = dict(saved)
    others = {name: kept[name] for name in kept if name != "steps"}
    for changed in (others, kept | {"ids": kept["ids"][:, :1]}, kept | {"ids": kept["ids"] + 99}):
        np.savez(file, **changed)
        caplog.clear()
        assert probe_of(task, tmp_path, world, step=20).evaluations == []
        assert "evaluations of steps up to 20 are lost from it" in caplog.text
    file.unlink()
    caplog.clear()
    assert probe_of(task, tmp_path, world, step=20).evaluations == []
    assert not caplog.text


@pytest.mark.parametrize(
    "moe",
    [
        {"expert_out_map": LinearMap(), "expert_in_map": LinearMap()},
        {
            "expert": SwiGLUExpert(),
            "expert_out_map": SeparateMaps(),
            "expert_in_map": SeparateMaps(),
        },
    ],
)
def test_outputs_of_every_expert_are_its_networks(folder: Path, moe: dict[str, Any]) -> None:
    task = build_task(config(folder, **moe))
    shake(task)
    layer = moe_layers(task)[0]
    x = torch.randn(5, 16)
    outputs = layer.expert_outputs(x)
    up, down = layer.experts.up.rows(), layer.experts.down.rows()
    after = layer.experts.down.map(outputs) if layer.experts.down.shared else outputs
    for i in range(EXPERTS):
        hidden = x @ up[i].T
        if layer.experts.expert.kind == "gelu":
            hidden = F.gelu(hidden)
        else:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        assert_close(after[i], hidden @ down[i])


def test_outputs_are_compared_before_and_after_a_shared_map(
    folder: Path, tmp_path: Path, world: World
) -> None:
    task = build_task(config(folder, expert_out_map=LinearMap()))
    similarity = [f"val/moe/00/output_similarity{when}" for when in ("", "_before_map")]
    first = probe_of(task, tmp_path, world).measure(1)
    assert first[similarity[0]] == first[similarity[1]], "the map starts at the identity"
    for layer in moe_layers(task):
        with torch.no_grad():
            assert layer.experts.down.W is not None
            # all outputs on one line
            layer.experts.down.W.copy_(torch.ones(16, 1) @ torch.ones(1, 16))
    mapped = probe_of(task, tmp_path, world).measure(1)
    assert mapped[similarity[1]] == first[similarity[1]]
    assert mapped[similarity[0]] != first[similarity[0]]


def test_deepspeeds_layer_is_measured_as_ours(folder: Path, tmp_path: Path, world: World) -> None:
    found = []
    for dispatch in ("sorted", "deepspeed_capacity"):
        task = build_task(config(folder, dispatch=dispatch))
        found.append(probe_of(task, tmp_path, world).measure(1))
    assert_close(found[1], found[0])


def test_choices_that_are_left_open_count_for_nobody(
    folder: Path, tmp_path: Path, world: World
) -> None:
    task = build_task(config(folder, router=ExpertChoiceOptions()))
    shake(task)
    probe = probe_of(task, tmp_path, world, eval_batch_size=100)
    found = probe.measure(1)
    probe.measure(2)
    probe.write()
    expected = routings(task, probe.tokens.windows)
    with np.load(tmp_path / "probe.npz") as saved:
        ids = saved["ids"]
        assert saved["saturation"].tolist() == [[1.0] * LAYERS] * 2
    assert ids.shape[-1] < EXPERTS
    assert (ids < 0).any()
    for layer, r in enumerate(expected):
        for row, chosen in zip(ids[0, layer], r.ids.tolist(), strict=True):
            assert sorted(i for i in row if i >= 0) == sorted(i for i in chosen if i >= 0)
    # every expert takes equally many, but not with equal gates
    assert found["val/moe/00/importance_cv2"] > 0


@pytest.mark.parametrize("tokens", [0, 160])
def test_without_tokens_or_experts_there_is_nothing(
    folder: Path, tmp_path: Path, world: World, tokens: int
) -> None:
    settings = config(folder)
    if tokens:
        settings = replace(settings, language_model=replace(settings.language_model, moe_every=0))
    probe = probe_of(build_task(settings), tmp_path, world, probe_tokens=tokens)
    assert probe.measure(1) == {}
    assert probe.pictures() == {}
    assert probe.saturations() == {}
    probe.write()
    assert not (tmp_path / "probe.npz").exists()


def test_one_expert_has_no_boundary_and_no_pair(folder: Path, tmp_path: Path, world: World) -> None:
    task = build_task(config(folder, experts=1, top_k=1))
    probe = probe_of(task, tmp_path, world)
    left = {m for m in MEASURES if f"val/moe/mean/{m}" not in probe.measure(1)}
    assert left == {"boundary_margin", "output_similarity", "logits_rank"}
    assert {name.rsplit("/", 1)[1] for name in probe.pictures()} == {"domains"}


def test_a_run_logs_measures_pictures_and_the_probe(
    folder: Path, tmp_path: Path, world: World
) -> None:
    settings = replace(config(folder), name="short")
    summary = train_two_steps(settings, tmp_path / "runs", world)
    run_dir = tmp_path / "runs" / "short"
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("00", "01", "mean"):
        assert {f"val/moe/{name}/{m}" for m in MEASURES} <= set(last)
    assert summary["val/moe/mean/confidence"] == last["val/moe/mean/confidence"]
    assert kept_steps(run_dir) == [2]
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    images = set(events.Tags()["images"])
    assert {f"val/moe/01/{name}" for name in ("co_activation", "domains")} <= images
    (rows,) = events.Tensors("val/moe/rows_of_pictures/text_summary")
    assert b"blue" in rows.tensor_proto.string_val[0]


def layers_run(world: World, folder: Path, flags: tuple[str, ...]) -> int:
    """By this rank's probe, in one evaluation."""
    kept = ("--runs_dir", str(folder / "runs"), "--data.cache_dir", str(folder / "cache"))
    settings = with_flags(Config(), (*flags, *kept), "train")
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Trainer(settings, world, lambda: False)) as trainer:
        calls: list[int] = []
        for module in trainer.task.model.modules():
            if isinstance(module, MoE):
                module.register_forward_hook(lambda *_: calls.append(1))
        trainer.recorder.probe.measure(0)
    return len(calls)


@pytest.mark.distributed
@pytest.mark.parametrize("shared", [False, True])
def test_the_probe_runs_on_the_ranks_that_hold_a_part_of_what_it_runs(
    shared: bool, folder: Path, two_ranks: TwoRanks
) -> None:
    flags = (
        *("--task", "language_model", "--data.vocabulary", "300", "--name", f"share_{shared}"),
        *("--data.source", str(folder / "corpus"), "--data.context", "8"),
        *("--moe.experts", "6", "--moe.top_k", "2", "--moe.hidden", "8"),
        *("--train.batch_size", "4", "--train.probe_tokens", "80"),
        *("--moe.expert_parallel", "2" if shared else "1"),
    )
    first, second = two_ranks(layers_run, folder, flags)
    assert first > 0
    assert second == (first if shared else 0)


@pytest.mark.distributed
def test_ranks_that_share_experts_measure_what_one_does(
    folder: Path, world: World, two_ranks: TwoRanks
) -> None:
    flags = (
        *("--task", "language_model", "--data.vocabulary", "300"),
        *("--data.source", str(folder / "corpus")),
        *("--data.context", "8", "--moe.experts", "6", "--moe.top_k", "2", "--moe.hidden", "8"),
        *("--train.steps", "2", "--train.eval_every", "1", "--train.batch_size", "4"),
        *("--train.probe_tokens", "160", "--moe.expert_out_map.kind", "linear"),
    )
    split = ("--moe.expert_parallel", "2")
    one = train_flags(world, folder, "--name", "one", *flags)
    two, _ = two_ranks(train_flags, folder, "--name", "two", *flags, *split)
    found = [
        [
            {k: v for k, v in line.items() if k.rsplit("/", 1)[-1] in MEASURES | {"fluctuation"}}
            for line in metrics(run_dir)
        ]
        for run_dir in (one, two)
    ]
    assert "val/moe/00/fluctuation" in found[0][1]
    # sums over ranks round differently, and Adam's first steps magnify it
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
