"""The language model: causal, paired over arms, with the losses it says; dense arms, checkpointed
activations, compiled blocks, generation and merged norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters as dynamo_counters
from torch.testing import assert_close

from simvq_moe.config.moe import MoEConfig
from simvq_moe.core.step_state import StepState
from simvq_moe.core.usage import counters
from simvq_moe.models.blocks import DenseBlock, MoEBlock
from simvq_moe.models.language_model import LanguageModel, draw
from simvq_moe.moe.balances.aux import AuxBalance
from simvq_moe.moe.balances.loss_free import LossFreeBalance
from simvq_moe.moe.balances.none import NoBalance
from simvq_moe.moe.balances.quantile import QuantileBalance
from simvq_moe.moe.expert_kinds import GeluExpert, SwiGLUExpert
from simvq_moe.moe.maps import LinearMap
from simvq_moe.moe.routers.cosine import CosineOptions
from simvq_moe.moe.routers.distance import DistanceOptions
from simvq_moe.moe.routers.expert_choice import ExpertChoiceOptions
from simvq_moe.moe.routers.hash import HashOptions
from simvq_moe.moe.routers.hyper import HyperOptions
from simvq_moe.moe.routers.noisy_topk import NoisyTopKOptions
from simvq_moe.moe.routers.topk import TopKOptions
from tests.models.tracing import of_tracing, untyped

assert untyped  # a fixture

OF_THE_MODEL = (
    *("layers", "moe_every", "tied_head", "qk_norm", "depth_scaled", "activation_checkpointing"),
)


def model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    of_model: dict[str, Any] = {"layers": 2} | {
        k: v for k, v in options.items() if k in OF_THE_MODEL
    }
    moe = {"experts": 6, "top_k": 2, "hidden": 8, "balance": AuxBalance(weight=0.5)}
    moe |= {k: v for k, v in options.items() if k not in OF_THE_MODEL}
    return LanguageModel(50, 12, width=16, heads=2, moe=MoEConfig(**moe), **of_model)


def test_a_later_token_changes_no_earlier_score() -> None:
    lm = model()
    tokens = torch.randint(50, (3, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = lm.logits(tokens)[0], lm.logits(changed)[0]
    assert_close(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7:], before[:, 7:])


def test_the_loss_is_the_cross_entropy_of_the_next_token_plus_the_weighted_balance() -> None:
    lm = model()
    window = torch.randint(50, (3, 13))
    loss, terms = lm(window)
    logits, losses = lm.logits(window[:, :-1])
    nats = [-F.log_softmax(logits[b, t], -1)[window[b, t + 1]] for b in range(3) for t in range(12)]
    assert_close(terms["cross_entropy"], torch.stack(nats).mean())
    assert_close(loss, terms["cross_entropy"] + 0.5 * losses["balance"])


def test_arms_start_from_the_same_weights_and_the_same_first_loss() -> None:
    window = torch.randint(50, (3, 13))
    base = model()
    for moe in ({"expert_out_map": LinearMap()}, {"router": TopKOptions(map=LinearMap())}):
        assert_close(model(**moe)(window), base(window), rtol=0, atol=0)
    narrow = model(router=TopKOptions(map=LinearMap(base_width=4)))
    for name, weight in base.state_dict().items():
        if "router" not in name:
            assert_close(narrow.state_dict()[name], weight, rtol=0, atol=0)


def test_the_last_of_every_so_many_blocks_has_a_mixture() -> None:
    for every, kinds in ((1, "MMMM"), (2, "DMDM"), (3, "DDMD"), (0, "DDDD")):
        lm = model(layers=4, moe_every=every)
        expected = [MoEBlock if kind == "M" else DenseBlock for kind in kinds]
        assert [type(block) for block in lm.blocks] == expected


@pytest.mark.parametrize("expert", [GeluExpert(), SwiGLUExpert()])
def test_a_dense_block_is_as_wide_as_the_experts_that_a_token_meets(expert: Any) -> None:
    block = model(moe_every=0, expert=expert, top_k=3, shared_experts=2).blocks[0]
    assert isinstance(block, DenseBlock)
    assert block.dense.down.weight.shape == (16, (3 + 2) * 8)


def test_blocks_of_all_arms_start_from_the_same_attention_whatever_follows_it() -> None:
    start = model(layers=3).state_dict()
    arms: tuple[dict[str, Any], ...] = (
        {"moe_every": 0},
        {"moe_every": 2},
        {"experts": 9, "hidden": 4, "shared_experts": 1},
        {"tied_head": False},
        {"qk_norm": True},
        {"router": HashOptions(), "balance": NoBalance()},
    )
    for options in arms:
        other = model(layers=3, **options).state_dict()
        for name in start:
            if "attention" in name or "embedding" in name:
                assert_close(other[name], start[name], rtol=0, atol=0)


def test_a_model_without_mixtures_has_no_loss_but_cross_entropy() -> None:
    loss, terms = model(moe_every=0)(torch.randint(50, (3, 13)))
    assert list(terms) == ["cross_entropy"]
    assert_close(loss, terms["cross_entropy"])


def test_matrices_that_end_a_branch_start_smaller_where_depth_scales_them() -> None:
    scaled, plain = (
        dict(model(layers=8, depth_scaled=scales).named_parameters()) for scales in (True, False)
    )
    ending = [
        name for name in plain if name.endswith(("experts.down.base", "attention.out.weight"))
    ]
    assert len(ending) == 16
    for name, value in plain.items():
        assert_close(value, scaled[name] * (4 if name in ending else 1))


def test_an_untied_head_has_a_matrix_of_its_own() -> None:
    lm = model(tied_head=False)
    assert lm.head is not None
    assert 0.015 < lm.head.weight.std().item() < 0.025
    x = torch.randn(2, 16)
    assert_close(lm._scores(x), x @ lm.head.weight.T)
    lm.head.weight.data.zero_()
    assert lm.logits(torch.randint(50, (1, 4)))[0].count_nonzero() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"balance": LossFreeBalance(), "router": TopKOptions(centre=True)},
        {"router": NoisyTopKOptions(), "moe_every": 2},
        {"balance": QuantileBalance(), "capacity_factor": 1.0, "expert_out_map": LinearMap()},
        {"moe_every": 0},
    ],
    ids=["loss_free", "noisy", "capacity", "dense"],
)
def test_checkpointed_activations_change_no_gradient_and_count_nothing_twice(
    options: dict[str, Any],
) -> None:
    window = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(1))
    found = []
    for again in (False, True):
        lm = model(activation_checkpointing=again, **options)
        lm(window)[0].backward()
        collected = [m.pending for m in lm.modules() if isinstance(m, StepState)]
        collected += [counter.counts for counter in counters(lm)]
        found.append([p.grad for p in lm.parameters()] + collected)
    assert all(n.sum() > 0 for n in collected)
    assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.usefixtures("untyped")
@of_tracing
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"moe_every": 2, "activation_checkpointing": True}),
        (torch.bfloat16, {"balance": LossFreeBalance(), "shared_experts": 1}),
    ],
    ids=["attention", "dense and checkpointed", "mixtures"],
)
def test_compiled_blocks_compute_and_count_what_eager_ones_do(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    compiled, eager = (model(hidden=16, **options).to(dtype) for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    window = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(1))
    for lm in (compiled, eager):
        lm(window)[0].backward()
    for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    counted = [[counter.counts for counter in counters(lm)] for lm in (compiled, eager)]
    assert_close(*counted, rtol=0, atol=0)
    assert dynamo_counters["stats"]["unique_graphs"] == (1 if "moe_every" not in options else 2)
    assert not dynamo_counters["graph_break"]


@pytest.mark.usefixtures("untyped")
@of_tracing
def test_nothing_is_compiled_anew_for_the_shapes_of_evaluation_and_generation() -> None:
    lm = model(moe_every=2)
    lm.compile_blocks(backend="aot_eager")
    lm.eval()
    lm.logits(torch.randint(50, (2, 7)))
    lm.train()
    lm.generate(torch.randint(50, (2, 7)), 2)
    assert dynamo_counters["stats"]["unique_graphs"] == 0
    lm(torch.randint(50, (2, 13)))
    assert dynamo_counters["stats"]["unique_graphs"] == 2


def best_by_hand(lm: LanguageModel, tokens: list[int], number: int) -> list[int]:
    for _ in range(number):
        scores = lm.logits(torch.tensor([tokens[-12:]]))[0][0, -1]
        tokens = [*tokens, int(scores.argmax())]
    return tokens


def test_generation_takes_the_best_token_of_the_last_window_again_and_again() -> None:
    lm = model().eval()
    written = lm.generate(torch.tensor([[3, 1, 4], [1, 5, 9]]), 15, temperature=0.0)
    # past the context of 12 the window slides
    assert written.tolist() == [best_by_hand(lm, ids, 15) for ids in ([3, 1, 4], [1, 5, 9])]
    assert_close(lm.generate(torch.tensor([[3, 1, 4]]), 15, top_k=1), written[:1])


def test_generated_tokens_are_drawn_by_temperature_from_the_best() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, 3.0]]).log().expand(20_000, 4)
    random = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_k: int) -> torch.Tensor:
        drawn = draw(scores, temperature, top_k, random).flatten()
        return drawn.bincount(minlength=4) / len(drawn)

    # a share of 20,000 draws has a standard deviation below 0.004
    for found, expected in (
        (shares(1.0, 0), [0, 2 / 6, 1 / 6, 3 / 6]),
        (shares(0.5, 0), [0, 4 / 14, 1 / 14, 9 / 14]),
        (shares(1.0, 2), [0, 2 / 5, 0, 3 / 5]),
    ):
        assert_close(found, torch.tensor(expected), rtol=0, atol=0.015)


def test_generation_repeats_with_its_seed_counts_nothing_and_leaves_the_rest_as_it_was() -> None:
    lm = model(balance=LossFreeBalance())
    tokens, state = torch.tensor([[3, 1, 4]]), torch.get_rng_state()
    found = [
        lm.generate(tokens, 20, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    ]
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.equal(found[0], found[2])
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert lm.training
    assert all(counter.counts.sum() == 0 for counter in counters(lm))
    assert all(m.pending.sum() == 0 for m in lm.modules() if isinstance(m, StepState))


def test_generation_needs_a_beginning() -> None:
    with pytest.raises(ValueError, match="give at least one token"):
        model().generate(torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_every": 2, "tied_head": False},
        {"expert": SwiGLUExpert(), "shared_experts": 1, "capacity_factor": 1.0},
        {"router": NoisyTopKOptions()},
        {"router": ExpertChoiceOptions()},
    ],
    ids=["plain", "untied", "swiglu", "noisy_topk", "expert_choice"],
)
def test_merged_norms_leave_ones_and_the_same_scores(options: dict[str, Any]) -> None:
    lm = model(**options).double().eval()
    norms = {name: m for name, m in lm.named_modules() if isinstance(m, torch.nn.RMSNorm)}
    for norm in norms.values():
        norm.weight.data.uniform_(0.5, 2.0)
    tokens = torch.randint(50, (3, 12))
    before = lm.logits(tokens)[0]
    lm.merge_norms_()
    assert_close(lm.logits(tokens)[0], before)
    left = [name for name, norm in norms.items() if not torch.equal(norm.weight, torch.ones(16))]
    assert left == (["norm"] if lm.head is None else [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": CosineOptions()}, "CosineRouter has no rows"),
        ({"router": DistanceOptions()}, "DistanceRouter has no rows"),
        ({"router": HyperOptions()}, "HyperRouter has no rows"),
        ({"router": TopKOptions(centre=True)}, "TopKRouter takes a mean off its input"),
        ({"expert_in_map": LinearMap()}, "fold the maps first"),
    ],
    ids=["cosine", "distance", "hyper", "centred", "mapped"],
)
def test_a_gain_that_can_not_be_merged_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**options).merge_norms_()
