"""SimVQ weights to and from the authors' code and vector-quantize-pytorch: equal ids both ways.

The authors' quantizer (arXiv:2411.02038) holds `embedding.weight` and
`embedding_proj.{weight,bias}`; vector-quantize-pytorch's SimVQ holds `frozen_codebook` and
`code_transform.{weight,bias}`. Both keep the map as a linear layer, the transpose of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from simvq_moe.core.choices import check_choice
from simvq_moe.quantizers.kinds.simvq import SimVQ

Layout = Literal["official", "vector_quantize_pytorch"]

NAMES: dict[Layout, tuple[str, str]] = {
    "official": ("embedding.weight", "embedding_proj"),
    "vector_quantize_pytorch": ("frozen_codebook", "code_transform"),
}


@torch.no_grad()
def simvq_from(state: Mapping[str, Tensor], **options: Any) -> SimVQ:
    """A SimVQ with the codes of a foreign state dict of either layout.

    Args:
        state: the quantizer's own entries, without a prefix.
        options: `gradient`, `codebook_weight`, `commitment_weight` and `channels_first` of SimVQ.

    Raises:
        ValueError: the names are those of neither layout.
    """
    for base, layer in NAMES.values():
        if {base, f"{layer}.weight"} <= state.keys():
            q, weight, bias = state[base], state[f"{layer}.weight"], state.get(f"{layer}.bias")
            made = SimVQ(
                len(q), len(weight), base_width=q.shape[1], bias=bias is not None, **options
            ).to(q)
            assert made.bank.W is not None
            made.bank.base.copy_(q)
            made.bank.W.copy_(weight.T)
            if bias is not None and made.bank.bias is not None:
                made.bank.bias.copy_(bias)
            return made
    raise ValueError(f"state dict with {sorted(state)}: none of the known layouts {NAMES}")


@torch.no_grad()
def state_for(quantizer: SimVQ, layout: Layout) -> dict[str, Tensor]:
    """The state dict of the same codes in a foreign layout.

    Raises:
        ValueError: the layout is unknown, or the map is not a full matrix, which a linear layer
            needs.
    """
    check_choice("layout", layout, Layout)
    bank = quantizer.bank
    if bank.W is None or bank.transform != "linear":
        raise ValueError(f"transform {bank.transform!r} has no linear layer: fold() instead")
    base, layer = NAMES[layout]
    state = {base: bank.base.detach().clone(), f"{layer}.weight": bank.W.detach().T.contiguous()}
    if bank.bias is not None:
        state[f"{layer}.bias"] = bank.bias.detach().clone()
    elif layout == "official":
        state[f"{layer}.bias"] = torch.zeros_like(bank.W[0])
    return state
