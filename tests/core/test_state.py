"""Tensors beside the weights keep their value, precision and place, whoever handles the module."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.core.state import Stateful, held_tensors


class Example(Stateful):
    constant: torch.Tensor
    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hold("constant", partial(torch.tensor, [3, 1, 4]))
        self.register_average("average", torch.full((2,), 0.1), torch.float32)
        self.weight = torch.nn.Parameter(torch.ones(2))


def on_meta() -> Example:
    with torch.device("meta"):
        return Example()


def test_constants_are_made_again_where_a_module_gets_room() -> None:
    module = on_meta().to_empty(device="cpu")
    assert module.constant.tolist() == [3, 1, 4]
    assert [t.tolist() for t in held_tensors(module)] == [[3, 1, 4]]
    assert "constant" not in {name for name, _ in module.named_buffers()}


def test_constants_are_made_again_where_weights_are_assigned() -> None:
    module = on_meta()
    module.load_state_dict(Example().state_dict(), assign=True)
    assert module.constant.tolist() == [3, 1, 4]
    assert_close(module.average, Example().average)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_averages_keep_their_precision_and_their_bits(dtype: torch.dtype) -> None:
    module = Example().to(dtype)
    assert module.weight.dtype == dtype
    assert module.average.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(module.average.float(), Example().average)
    narrow = {k: v.bfloat16() for k, v in Example().state_dict().items()}
    module.load_state_dict(narrow, assign=True)
    assert module.average.dtype == torch.float32


def test_what_is_made_in_inference_mode_can_change_outside_of_it() -> None:
    with torch.inference_mode():
        module = Example()
        module.constant += 1
    module.constant += 1
    assert module.constant.tolist() == [5, 3, 6]


def test_copies_and_pickles_hold_their_own() -> None:
    module = Example()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.constant.zero_()
        assert module.constant.tolist() == [3, 1, 4]
