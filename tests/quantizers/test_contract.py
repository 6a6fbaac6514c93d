"""What holds for every quantizer: layout, masks, precision, empty batches, saving, compiling."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ
from simvq_moe.config.docs import field_docs
from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.registry import kinds
from simvq_moe.config.schema import Config
from simvq_moe.core.search.nearest import NotFiniteError
from simvq_moe.core.usage import counters, counting
from simvq_moe.hub import Pretrained
from simvq_moe.quantizers import (
    BSQ,
    IBQ,
    MLPVQ,
    NSVQ,
    PADDING,
    AnyQuantizer,
    CosineVQ,
    GroupedQuantizer,
    GroupVQ,
    Projected,
    Quantizer,
    RunningMapVQ,
)
from simvq_moe.quantizers.interchange import state_for
from tests.shape_checks import without_shape_checks

FAMILIES: dict[str, Callable[..., AnyQuantizer]] = {
    "vq": lambda **o: VQ(12, 4, **o),
    "vq kmeans": lambda **o: VQ(12, 4, init="kmeans", **o),
    "vq restart": lambda **o: VQ(12, 4, restart=0.99, **o),
    "vq noise": lambda **o: VQ(12, 4, gradient="noise_substitution", **o),
    "ns": lambda **o: NSVQ(12, 4, **o),
    "ns restart": lambda **o: NSVQ(12, 4, restart=0.99, **o),
    "running map": lambda **o: RunningMapVQ(12, 4, **o),
    "ema": lambda **o: EMAVQ(12, 4, **o),
    "ema restart": lambda **o: EMAVQ(12, 4, restart=0.9, **o),
    "cosine": lambda **o: CosineVQ(12, 4, **o),
    "cosine restart": lambda **o: CosineVQ(12, 4, restart=0.99, **o),
    "simvq": lambda **o: SimVQ(12, 4, **o),
    "simvq diagonal": lambda **o: SimVQ(12, 4, transform="diagonal", bias=True, **o),
    "simvq both": lambda **o: SimVQ(12, 4, train_base=True, **o),
    "simvq data": lambda **o: SimVQ(12, 4, init="data", **o),
    "simvq wide": lambda **o: SimVQ(12, 4, base_width=7, **o),
    "simvq rotation": lambda **o: SimVQ(12, 4, gradient="rotation", **o),
    "simvq diveq": lambda **o: SimVQ(12, 4, gradient="diveq", **o),
    "group": lambda **o: GroupVQ(12, 4, groups=3, **o),
    "group data": lambda **o: GroupVQ(12, 4, groups=3, init="data", **o),
    "mlp": lambda **o: MLPVQ(12, 4, **o),
    "ibq": lambda **o: IBQ(12, 4, **o),
    "fsq": lambda **o: FSQ([4, 5, 3], **o),
    "lfq": lambda **o: LFQ(5, **o),
    "bsq": lambda **o: BSQ(4, **o),
    "projected": lambda **o: Projected(CosineVQ(12, 3), 4, **o),
    "projected levels": lambda **o: Projected(ResidualQuantizer([VQ(12, 3), EMAVQ(9, 3)]), 4, **o),
    "residual": lambda **o: ResidualQuantizer([VQ(12, 4), SimVQ(9, 4, init="data")], **o),
    "residual rotation": lambda **o: ResidualQuantizer(
        [EMAVQ(12, 4), FSQ([3] * 4)], gradient="rotation", **o
    ),
    "residual averages": lambda **o: ResidualQuantizer([SimVQ(12, 4), EMAVQ(9, 4)], **o),
    "residual grids": lambda **o: ResidualQuantizer([FSQ([5, 2]), FSQ([5, 2]), LFQ(2)], **o),
    "grouped": lambda **o: GroupedQuantizer([VQ(12, 4, init="kmeans"), LFQ(3)], **o),
    "grouped residual": lambda **o: GroupedQuantizer(
        [ResidualQuantizer([SimVQ(5, 2), SimVQ(6, 2)]) for _ in range(2)], **o
    ),
}


def test_every_registered_kind_is_under_contract() -> None:
    made = {type(build()) for build in FAMILIES.values()}
    for kind in kinds(QuantizerOptions):
        assert type(of_config(kind).build()) in made, f"{kind}: add it to FAMILIES"


@pytest.mark.parametrize("kind", kinds(QuantizerOptions))
def test_a_kind_of_a_config_builds_what_it_says_and_every_option_has_a_doc_line(kind: str) -> None:
    options = of_config(kind)
    assert not list(options.problems("quantizer", Config(quantizer=options)))
    quantizer = options.build()
    assert (quantizer.codes, quantizer.width) == (options.codes, options.width)
    for name, doc in field_docs(type(options)).items():
        assert doc, f"{kind}.{name} has no doc line"
    folded = options.folded()
    assert folded is None or type(quantizer.fold()) is type(folded.build())


@pytest.mark.parametrize("kind", kinds(QuantizerOptions))
def test_a_class_has_the_defaults_of_its_options(kind: str) -> None:
    options: Any = kinds(QuantizerOptions)[kind]
    found: dict[str, Any] = {}
    for parent in reversed(options.quantizer.__mro__):
        parameters = inspect.signature(vars(parent).get("__init__", object)).parameters.values()
        found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    mine = {f.name: f.default for f in fields(options) if f.name in found}
    for name, default in mine.items():
        assert default in ("default", found[name]), f"{kind}.{name}"


@pytest.mark.parametrize("kind", kinds(QuantizerOptions))
def test_residual_levels_of_a_kind_are_built_or_refused_by_its_key(kind: str) -> None:
    options = of_config(kind, residual_levels=2)
    problems = list(options.problems("quantizer", Config(quantizer=options)))
    if problems:
        assert "quantizer.residual_levels 2" in problems[0]
    else:
        assert len(list(options.build())) == 2


def of_config(kind: str, **given: Any) -> QuantizerOptions:
    return replace(kinds(QuantizerOptions)[kind].example(), **given)


@pytest.fixture(params=list(FAMILIES))
def build(request: pytest.FixtureRequest) -> Callable[..., AnyQuantizer]:
    torch.manual_seed(0)
    return FAMILIES[request.param]


def train_one_step(quantizer: AnyQuantizer) -> None:
    quantizer(torch.randn(64, quantizer.width))


def test_decode_of_the_ids_equals_the_forward_value(build: Callable[..., AnyQuantizer]) -> None:
    quantizer = build()
    train_one_step(quantizer)
    quantizer.eval()
    z = torch.randn(2, 5, quantizer.width)
    out = quantizer(z)
    assert out.ids.dtype == torch.int64
    assert torch.equal(quantizer.decode(out.ids), out.z_q)
    assert torch.equal(quantizer.encode(z), out.ids)
    assert out.loss.shape == ()


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(FAMILIES)),
    lead=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    training=st.booleans(),
)
def test_any_leading_shape_and_float_dtype_gives_that_shape_and_dtype(
    name: str, lead: list[int], dtype: torch.dtype, training: bool
) -> None:
    torch.manual_seed(0)
    quantizer = FAMILIES[name]().train(training)
    z = torch.randn(*lead, quantizer.width).to(dtype).requires_grad_()
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.z_q.dtype == dtype
    assert out.ids.shape[: len(lead)] == z.shape[:-1]
    assert out.loss.dtype == torch.promote_types(dtype, torch.float32)
    (out.loss + out.z_q.sum()).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    assert bool(out.loss.isfinite())


def test_channels_first_is_the_same_quantizer_on_moved_axes(
    build: Callable[..., AnyQuantizer],
) -> None:
    last, first = build(), build(channels_first=True)
    first.load_state_dict(last.state_dict())
    z = torch.randn(2, 3, 5, last.width)
    torch.manual_seed(1)
    a = last(z)
    torch.manual_seed(1)
    b = first(z.movedim(-1, 1))
    assert torch.equal(a.ids, b.ids)
    assert_close(a.z_q, b.z_q.movedim(1, -1))
    last.eval()
    first.eval()
    assert torch.equal(last.decode(a.ids), first.decode(a.ids).movedim(1, -1))
    assert torch.equal(last.encode(z), first.encode(z.movedim(-1, 1)))


def test_padding_enters_no_loss_no_statistic_and_no_count(
    build: Callable[..., AnyQuantizer],
) -> None:
    packed, padded = build(), build()
    padded.load_state_dict(packed.state_dict())
    z, mask = torch.randn(3, 6, packed.width), torch.rand(3, 6) < 0.6
    z[~mask] = torch.nan
    torch.manual_seed(1)
    a = packed(z[mask])
    torch.manual_seed(1)
    b = padded(z, mask)
    assert torch.equal(b.z_q[mask], a.z_q)
    assert torch.equal(b.ids[mask], a.ids)
    assert bool((b.z_q[~mask] == 0).all())
    assert bool((b.ids[~mask] == PADDING).all())
    assert_close(b.loss, a.loss)
    assert_close(padded.state_dict(), packed.state_dict())
    for x, y in zip(counters(padded), counters(packed), strict=True):
        assert torch.equal(x.counts, y.counts)
        assert int(x.counts.sum()) == int(mask.sum())
    padded.eval()
    decoded = padded.decode(b.ids)
    assert bool((decoded[~mask] == 0).all())
    assert bool((padded.encode(z, mask)[~mask] == PADDING).all())


def test_nan_is_an_error_and_never_a_silent_id(build: Callable[..., AnyQuantizer]) -> None:
    quantizer = build()
    train_one_step(quantizer)
    z = torch.randn(5, quantizer.width)
    z[2, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 5 latents are not finite"):
        quantizer.encode(z)
    with pytest.raises(ValueError, match="1 of 5 latents are not finite"):
        quantizer(z)


def test_float64_stays_float64_throughout(build: Callable[..., AnyQuantizer]) -> None:
    quantizer = build().double()
    z = torch.randn(9, quantizer.width, dtype=torch.float64)
    out = quantizer(z)
    assert out.z_q.dtype == torch.float64
    single = out.z_q.float().double()
    assert quantizer.eval().decode(out.ids).dtype == torch.float64
    assert out.z_q.numel() == 0 or bool(single.isfinite().all())


def test_autocast_changes_nothing(build: Callable[..., AnyQuantizer]) -> None:
    plain, mixed = build(), build()
    mixed.load_state_dict(plain.state_dict())
    z = torch.randn(40, plain.width)
    torch.manual_seed(1)
    a = plain(z)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        b = mixed(z)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.z_q, b.z_q)
    assert_close(a.loss, b.loss, rtol=0, atol=0)


def test_a_saved_quantizer_comes_back_as_it_was(
    build: Callable[..., AnyQuantizer], tmp_path: Path
) -> None:
    quantizer = build(channels_first=True)
    z = torch.randn(2, quantizer.width, 9)
    quantizer(z)
    quantizer.eval().save_pretrained(tmp_path)
    restored = type(quantizer).from_pretrained(tmp_path).eval()
    assert_close(restored.state_dict(), quantizer.state_dict(), rtol=0, atol=0)
    assert torch.equal(restored(z).z_q, quantizer(z).z_q)
    assert restored.channels_first
    assert type(AnyQuantizer.from_pretrained(tmp_path)) is type(quantizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_saved_quantizer_comes_back_in_its_precision(
    build: Callable[..., AnyQuantizer], dtype: torch.dtype, tmp_path: Path
) -> None:
    quantizer = build().to(dtype).eval()
    quantizer.save_pretrained(tmp_path)
    restored = AnyQuantizer.from_pretrained(tmp_path)
    assert_close(restored.state_dict(), quantizer.state_dict(), rtol=0, atol=0)
    with torch.inference_mode():
        inside = AnyQuantizer.from_pretrained(tmp_path)
    z = torch.randn(9, quantizer.width, dtype=torch.float64)
    with torch.no_grad():
        ids = quantizer.encode(z)
        decoded = quantizer.decode(ids)
        for again in (restored, inside):
            assert torch.equal(again.encode(z), ids)
            assert again.decode(ids).dtype == decoded.dtype
            assert torch.equal(again.decode(ids), decoded)


def test_a_deep_copy_is_independent_and_equal(build: Callable[..., AnyQuantizer]) -> None:
    quantizer = build()
    train_one_step(quantizer)
    twin = copy.deepcopy(quantizer).eval()
    z = torch.randn(7, quantizer.width)
    assert torch.equal(twin(z).ids, quantizer.eval()(z).ids)


def test_loading_as_another_class_names_the_right_one(tmp_path: Path) -> None:
    VQ(4, 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a VQ: use VQ\.from_pretrained"):
        SimVQ.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"class": "os.system", "arguments": {}}')
    with pytest.raises(ValueError, match=r"class 'os\.system' is none of"):
        Pretrained.from_pretrained(tmp_path)


# of torch itself, where it traces an autograd.Function: with ranks, whose sums are differentiated
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_forward_compiles_without_a_graph_break(name: str, training: bool) -> None:
    assert_compiled_equals_eager(FAMILIES[name], training, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("training", [True, False])
def test_simvq_compiles_to_kernels_that_give_the_same(training: bool) -> None:
    assert_compiled_equals_eager(FAMILIES["simvq"], training, backend="inductor")


def assert_compiled_equals_eager(
    build: Callable[..., AnyQuantizer], training: bool, backend: str
) -> None:
    """Two passes, the second on what the first has changed."""
    torch.compiler.reset()
    torch.manual_seed(0)
    quantizer = build()
    train_one_step(quantizer)
    twin = copy.deepcopy(quantizer.train(training))
    compiled: Any = torch.compile(twin, backend=backend, fullgraph=True)
    for _ in range(2):
        z = torch.randn(8, quantizer.width, requires_grad=True)
        torch.manual_seed(1)
        a = quantizer(z)
        torch.manual_seed(1)
        b = compiled(z)
        assert torch.equal(a.ids, b.ids)
        assert_close(a.z_q, b.z_q)
        assert_close(a.loss, b.loss)
        assert_close(a.losses, b.losses)
        found: list[Any] = []
        for quantized, module in ((a, quantizer), (b, twin)):
            inputs = [z, *module.parameters()]
            loss = quantized.z_q.sin().sum() + quantized.loss
            found.append(torch.autograd.grad(loss, inputs, allow_unused=True))
        assert_close(*found)
        assert_close(twin.state_dict(), quantizer.state_dict())
        for x, y in zip(counters(quantizer), counters(twin), strict=True):
            assert torch.equal(x.counts, y.counts)


def test_a_wrong_width_names_the_shape() -> None:
    with pytest.raises(ValueError, match=r"latents \(2, 5\) have 5 channels on axis -1"):
        VQ(4, 3)(torch.zeros(2, 5))


def trained_module(name: str) -> AnyQuantizer:
    torch.manual_seed(0)
    quantizer = FAMILIES[name]()
    train_one_step(quantizer)
    with torch.no_grad():
        for p in quantizer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return quantizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_narrow_dtype_is_decoded_as_it_was_quantized(name: str, dtype: torch.dtype) -> None:
    quantizer = trained_module(name).eval()
    z = torch.randn(40, quantizer.width).to(dtype)
    for module in (quantizer, copy.deepcopy(quantizer).to(dtype)):
        out = module(z)
        found = module.decode(out.ids, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, out.z_q)
        assert torch.equal(module.decode(out.ids).to(dtype), out.z_q)
        if isinstance(module, Quantizer):
            book = module.codebook(dtype)
            assert book.dtype == dtype
            assert torch.equal(book[out.ids], out.z_q)


def test_infinite_latents_are_an_error_or_bounded(build: Callable[..., AnyQuantizer]) -> None:
    quantizer = build()
    train_one_step(quantizer)
    z = torch.randn(5, quantizer.width)
    z[2] = torch.inf
    try:
        out = quantizer.eval()(z)
    except NotFiniteError:
        return
    assert bool(out.z_q.isfinite().all())
    assert bool(out.loss.isfinite())


def test_it_trains_where_another_device_is_the_default(build: Callable[..., AnyQuantizer]) -> None:
    quantizer, z = build(), torch.randn(64, build().width)
    with torch.device("meta"):  # as set_default_device does
        out = quantizer(z)
        assert torch.equal(quantizer.eval().encode(z), quantizer(z).ids)
        quantizer.decode(out.ids)
    assert out.ids.device == z.device


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq", "vq", "projected", "residual grids"])
def test_ids_beyond_the_codes_are_an_error(name: str) -> None:
    quantizer = FAMILIES[name]().eval()
    ids = quantizer.encode(torch.randn(3, quantizer.width))
    ids[1] = 1000
    with pytest.raises(IndexError):
        quantizer.decode(ids)


def test_evaluation_and_folding_draw_no_random_number_and_change_no_state(
    build: Callable[..., AnyQuantizer],
) -> None:
    quantizer = build()
    train_one_step(quantizer)
    quantizer.eval()
    z, state = torch.randn(5, quantizer.width, requires_grad=True), torch.get_rng_state()
    before = copy.deepcopy(quantizer.state_dict())
    out = quantizer(z)
    (out.loss + out.z_q.sum()).backward()
    if isinstance(quantizer, SimVQ | RunningMapVQ):
        quantizer.fold()
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(quantizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_codebook_of_a_narrow_module_is_what_its_ids_decode_to(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    quantizer = FAMILIES[name]()
    train_one_step(quantizer)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    quantizer.to(dtype).eval()
    if not hasattr(quantizer, "codebook") or quantizer.id_axes:
        pytest.skip("several codebooks")
    assert isinstance(quantizer, Quantizer | Projected)
    codes = quantizer.decode(torch.arange(quantizer.codes))
    assert torch.equal(quantizer.codebook(), codes)
    if isinstance(quantizer, SimVQ):
        assert torch.equal(quantizer.fold().codebook(), codes)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_it_works_in_inference_mode_wherever_it_was_made(name: str, tmp_path: Path) -> None:
    quantizer = trained_module(name).eval()
    z = torch.randn(7, quantizer.width)
    expected = quantizer(z)
    quantizer.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(quantizer(z).z_q, expected.z_q)
        inside = AnyQuantizer.from_pretrained(tmp_path).eval()
        for module in (inside, copy.deepcopy(inside), copy.deepcopy(inside).double()):
            with counting(module):
                assert torch.equal(module(z).ids, expected.ids)
                assert torch.equal(module.encode(z), expected.ids)
            module.decode(expected.ids)
    # and what inference mode made, outside of it
    assert torch.equal(inside.encode(z), expected.ids)
    with torch.no_grad(), counting(inside) as found:
        assert torch.equal(inside(z).ids, expected.ids)
        assert all(int(counter.counts.sum()) > 0 for counter in found)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_built_on_the_meta_device_and_filled_it_is_what_it_was(name: str) -> None:
    whole = trained_module(name).eval()
    z = torch.randn(9, whole.width)
    for assign in (False, True):
        with torch.device("meta"):
            empty = FAMILIES[name]()
        if not assign:
            empty = empty.to_empty(device="cpu")
            for tensor in (*empty.buffers(), *empty.parameters()):
                tensor.detach().fill_(7)
        empty.load_state_dict(copy.deepcopy(whole.state_dict()), assign=assign)
        assert torch.equal(empty.eval()(z).ids, whole(z).ids)
        assert torch.equal(empty(z).z_q, whole(z).z_q)
        assert empty.waits_for_data == whole.waits_for_data
        for counter in counters(empty):
            assert int(counter.counts.sum()) == 0


@pytest.mark.parametrize("name", list(FAMILIES))
def test_ids_of_every_integer_dtype_are_meant_and_others_are_refused(name: str) -> None:
    quantizer = trained_module(name).eval()
    ids = quantizer.encode(torch.randn(6, quantizer.width))
    expected = quantizer.decode(ids)
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
    for dtype in kinds:
        assert torch.equal(quantizer.decode(ids.to(dtype)), expected)
    with without_shape_checks():
        for dtype in (torch.bool, torch.float32):
            with pytest.raises(ValueError, match=r"ids of torch\..*: give integers"):
                quantizer.decode(ids.to(dtype))


@pytest.mark.usefixtures("unchecked")
def test_a_mask_that_is_not_boolean_or_of_another_shape_is_refused() -> None:
    z, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    quantizer = VQ(8, 4)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32):
        for call in (quantizer, quantizer.encode, quantizer.initialize):
            if call == quantizer.initialize:
                call = VQ(8, 4, init="kmeans").initialize
            with pytest.raises(ValueError, match=r"mask of torch\..*: give booleans, such as mask"):
                call(z, mask.to(dtype))
        with pytest.raises(ValueError, match="give booleans"):
            quantizer.soft_assign(z, 2, mask.to(dtype))
    with pytest.raises(ValueError, match=r"mask \(2,\) for latents \(2, 3\): use one shape"):
        quantizer(z, mask[:, 0])


@pytest.mark.usefixtures("unchecked")
def test_a_word_that_is_no_choice_is_refused_with_the_choices() -> None:
    wrong: dict[str, Callable[..., Any]] = {
        "gradient": lambda **o: VQ(8, 4, **o),
        "init": lambda **o: VQ(8, 4, **o),
        "transform": lambda **o: SimVQ(8, 4, **o),
    }
    for name, build in wrong.items():
        with pytest.raises(ValueError, match=rf"{name} 'mine': choose one of '\w+', '\w+'"):
            build(**{name: "mine"})
    word: Any = "mine"
    for build in (EMAVQ, SimVQ, CosineVQ, IBQ):
        with pytest.raises(ValueError, match=r"init 'mine': choose one of"):
            build(8, 4, init=word)
    with pytest.raises(ValueError, match=r"init 'mine': choose one of"):
        GroupVQ(8, 4, groups=2, init=word)
    gradients: tuple[Any, ...] = ("mine", "diveq", "noise_substitution")
    for gradient in gradients:
        with pytest.raises(ValueError, match=rf"gradient '{gradient}': choose one of"):
            ResidualQuantizer([VQ(8, 4)], gradient=gradient)
    with pytest.raises(ValueError, match=r"layout 'mine': choose one of 'official'"):
        state_for(SimVQ(8, 4), word)


def test_one_code_is_no_codebook() -> None:
    with pytest.raises(ValueError, match="codes 1 < 2"):
        VQ(1, 3)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("vq", {"restart": 1.0}),
        ("ema", {"restart": 1.0}),
        ("group_vq", {"groups": 7}),
        ("simvq", {"init": "data", "transform": "none"}),
    ],
)
def test_a_constructor_refuses_what_options_refuse_with_the_same_line(
    kind: str, wrong: dict[str, Any]
) -> None:
    options = of_config(kind, **wrong)
    (line,) = options.problems("quantizer", Config(quantizer=options))
    with pytest.raises(ValueError, match=f"^{re.escape(line.replace('quantizer.', ''))}$"):
        options.build()
