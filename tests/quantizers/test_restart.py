"""Dead codes restart at latents of the batch, and stay there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from simvq_moe import EMAVQ, VQ
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.quantizers import CosineVQ, Quantizer

CODES, WIDTH = 64, 4
RESTARTING: dict[str, Callable[[float], Quantizer]] = {
    "vq": lambda restart: VQ(CODES, WIDTH, restart=restart),
    "cosine": lambda restart: CosineVQ(CODES, WIDTH, restart=restart),
    "ema": lambda restart: EMAVQ(CODES, WIDTH, restart=restart),
}


@pytest.fixture(params=list(RESTARTING))
def build(request: pytest.FixtureRequest) -> Callable[[float], Quantizer]:
    torch.manual_seed(0)
    return RESTARTING[request.param]


def near_the_first_code(quantizer: Quantizer, tokens: int = 256) -> Tensor:
    """Latents that only code 0 is nearest to, as long as no other comes closer."""
    code = quantizer.codebook()[:1].detach()
    return code + 1e-3 * torch.randn(tokens, WIDTH)


def is_latent(codes: Tensor, z: Tensor) -> Tensor:
    return (torch.cdist(codes.double(), z.double()) < 1e-6).any(1)


def test_dead_codes_become_different_latents_of_the_batch_and_stay_in_the_next_pass(
    build: Callable[[float], Quantizer],
) -> None:
    quantizer = build(0.985)
    z = near_the_first_code(quantizer)
    quantizer(z)  # the average of an idle code is 0.99 now
    assert not bool(is_latent(quantizer.codebook(), quantizer.prepare(z)).any())
    z = near_the_first_code(quantizer)
    quantizer(z)  # and 0.9801
    codes = quantizer.codebook().detach().clone()
    if not isinstance(quantizer, EMAVQ):  # smoothing moves a restarted average by 1e-5 of itself
        assert bool(is_latent(codes[1:], quantizer.prepare(z)).all())
    assert len(codes.unique(dim=0)) == CODES
    assert_close(codes, codes[:1].expand(CODES, -1), rtol=0, atol=0.02)
    out = quantizer(z)
    assert len(out.ids.unique()) > CODES / 2
    assert_close(quantizer.codebook().detach(), codes, rtol=0, atol=0.02)


def test_without_the_option_a_dead_code_stays_dead() -> None:
    torch.manual_seed(0)
    quantizer = VQ(CODES, WIDTH)
    assert set(quantizer.state_dict()) == {"bank.base"}
    before = quantizer.codebook().detach().clone()
    for _ in range(300):
        quantizer(near_the_first_code(quantizer, tokens=4))
    assert torch.equal(quantizer.codebook(), before)


def test_a_code_that_is_drawn_in_this_step_is_not_restarted(
    build: Callable[[float], Quantizer],
) -> None:
    quantizer = build(0.9)
    book = quantizer.codebook().detach().clone()
    averages = quantizer.get_buffer("counts" if isinstance(quantizer, EMAVQ) else "draws")
    averages.fill_(0.01)
    if isinstance(quantizer, EMAVQ):
        quantizer.sums.mul_(0.01)
    quantizer(book[:2].clone())
    # smoothing alone moves an average of 0.01 draws by a thousandth
    moved = (quantizer.codebook().detach() - book).norm(dim=1) > 0.02
    assert moved[:2].tolist() == [False, False]
    # two latents, so two of the other codes
    assert int(moved.sum()) == 2
    assert bool((averages[moved] == 1).all())


def test_a_restarted_code_learns_from_where_it_is() -> None:
    torch.manual_seed(0)
    quantizer = VQ(CODES, WIDTH, restart=0.995)
    quantizer(near_the_first_code(quantizer))
    before = quantizer.codebook().detach().clone()
    chosen = before[7:8] + 1e-5
    quantizer(chosen).losses["codebook"].backward()
    gradient = quantizer.bank.base.grad
    assert gradient is not None
    torch.optim.SGD(quantizer.parameters(), lr=WIDTH / 2).step()
    assert int((gradient.abs().sum(1) > 0).sum()) == 1
    assert_close(quantizer.codebook()[7:8].detach(), chosen)


class Trained(nn.Module):
    """A quantizer whose loss is the whole task, as an engine wants it."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: Tensor) -> Tensor:
        return self.quantizer(z).loss


@pytest.mark.parametrize("family", [VQ, CosineVQ])
def test_a_restart_survives_an_engine_with_weights_of_its_own(
    family: type[VQ], world: World
) -> None:
    torch.manual_seed(0)
    quantizer = family(CODES, WIDTH, restart=0.995)
    flags = ["--optimizer.lr", "1e-4", "--train.batch_size", "256"]
    engine = make_engine(Trained(quantizer), with_flags(Config(), flags, "train"), world)
    for _ in range(2):
        z = near_the_first_code(quantizer)
        engine.backward(engine(z))
        engine.step()
    codes = quantizer.codebook().detach()
    assert_close(codes, codes[:1].expand(CODES, -1), rtol=0, atol=0.02)


def test_thresholds_and_kinds_that_can_not_restart_are_refused() -> None:
    for family in (VQ, EMAVQ):
        with pytest.raises(ValueError, match=r"restart 1\.0: choose 0 .never. or less than 1"):
            family(8, 2, restart=1.0)
    for kind in ("simvq", "group_vq --quantizer.groups 2", "mlp_vq", "ibq"):
        flags = f"--quantizer.kind {kind} --quantizer.restart 0.1".split()
        with pytest.raises(ConfigError, match=r"restart .*belongs to .* 'ema'.*: drop it"):
            check(with_flags(Config(), flags, "train"))
    flags = ["--quantizer.kind", "vq", "--quantizer.restart", "1"]
    with pytest.raises(ConfigError, match=r"quantizer\.restart 1\.0: choose 0"):
        check(with_flags(Config(), flags, "train"))
