"""The probe: the same held-out tokens at every evaluation, and what the routers do with them.

Rank 0 measures, and keeps probe.npz, from which saturation against any later routing can be
computed again. With it run the ranks that hold a part of what it runs: those that share its
experts, and at ZeRO stage 3 all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.config.schema import TrainConfig
from simvq_moe.core.ids import NOBODY
from simvq_moe.engine.sharding import gathered, is_sharded
from simvq_moe.engine.world import World
from simvq_moe.files.of_runs import PROBE
from simvq_moe.files.regular import BrokenFileError, written_whole
from simvq_moe.moe import MoE
from simvq_moe.moe import routing_measures as of
from simvq_moe.moe.mixture import Mixture
from simvq_moe.moe.routers.base import Routing
from simvq_moe.records.tensorboard import CELL, heat_map
from simvq_moe.runs.counts import read_probe
from simvq_moe.tasks.registry import AnyTask

logger = logging.getLogger(__name__)

COMPARED_TOKENS = 128
"""Probe tokens, evenly spread, on which all experts' outputs are compared."""
WIDEST_PICTURE = 1024
"""Pixels, until an expert is one pixel wide."""


@dataclass(frozen=True)
class Evaluation:
    """How the probe was routed at one step."""

    step: int
    ids: np.ndarray
    """(layer, token, choice), `NOBODY`: none."""
    domain_counts: np.ndarray
    """int64 (layer, expert, domain): tokens of each domain that each expert has."""


class Probe:
    """Follows the routers of a model; without MoE layers or tokens it does nothing, and so it does
    for a task that gives it none.

    Args:
        task: the live model and its held-out set.
        train: size of the probe and of its batches.
        world: this rank among all.
        run_dir: folder of probe.npz.
        step: the step that the run goes on from; what was kept after it is dropped.
    """

    def __init__(
        self, task: AnyTask, train: TrainConfig, world: World, run_dir: Path, step: int
    ) -> None:
        self.model, self.batch, self.world = task.model, train.eval_batch_size, world
        self.path = run_dir / PROBE
        self.layers: list[Mixture] = []
        self.evaluations: list[Evaluation] = []
        if train.probe_tokens:
            self.layers = [m for m in task.model.modules() if isinstance(m, Mixture)]
        tokens = None
        if self.layers and self._takes_part():
            tokens = task.probe_tokens(train.probe_tokens)
        if tokens is None:
            self.layers = []
            return
        self.task, self.tokens = task, tokens
        self.experts, self.top_k = self.layers[0].num_experts, self.layers[0].top_k
        chance = of.uniform_routing(len(self.tokens.inputs), self.experts, self.top_k)
        self.chance = {"val/moe/co_activation_null": of.partner_share(chance, self.experts)}
        if world.is_main and step:
            self._take_up(step)

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Route the probe and keep it; every rank calls it, rank 0 gets the measures."""
        if not self.layers:
            return {}
        self.model.eval()
        inputs, routings = self._route()
        outputs, geometries = [], []
        for layer, x, routing in zip(self.layers, inputs, routings, strict=True):
            assert isinstance(layer, nn.Module)
            with gathered(layer):
                outputs.append(_similarities(layer, x))
                geometries.append(_geometry(layer, x, routing) if self.world.is_main else {})
        if not self.world.is_main:
            return {}
        self.evaluations = [e for e in self.evaluations if e.step < step]
        before = self.evaluations[-1].ids if self.evaluations else None
        layers = [
            self._measure(routing, None if before is None else torch.from_numpy(before[i]))
            | similar
            | directions
            for i, (routing, similar, directions) in enumerate(
                zip(routings, outputs, geometries, strict=True)
            )
        ]
        self._keep(step, routings)
        metrics = {
            f"val/moe/{i:02d}/{m}": v for i, one in enumerate(layers) for m, v in one.items()
        }
        for m in (m for m in layers[0] if all(m in one for one in layers)):
            metrics[f"val/moe/mean/{m}"] = float(np.mean([one[m] for one in layers]))
        return metrics | self.chance

    def _takes_part(self) -> bool:
        """Whether rank 0 can't run the probe without this one."""
        if any(is_sharded(p) for p in self.model.parameters()):
            return True
        ours = [layer for layer in self.layers if isinstance(layer, MoE)]
        if len(ours) < len(self.layers):  # DeepSpeed's own agrees on sizes with all
            return True
        return any(self.world.rank < _ranks_of(layer) for layer in ours)

    def saturations(self) -> dict[str, float]:
        """Mean saturation over layers at each evaluation but the last, against the last."""
        return {
            f"val/moe/mean/saturation_at/{evaluation.step}": float(row.mean())
            for evaluation, row in zip(self.evaluations[:-1], self._saturation(), strict=False)
        }

    @property
    def rows(self) -> str:
        """What the rows of the pictures are, from the top."""
        names = ", ".join(self.tokens.names) if self.layers else ""
        return f"co_activation: experts in order; domains: {names}"

    def pictures(self) -> dict[str, np.ndarray]:
        """Co-activation and domains of each layer at the last evaluation; 1 is even chance.

        Columns are experts, rows those of `rows`.
        """
        found: dict[str, np.ndarray] = {}
        for evaluation in self.evaluations[-1:]:
            cell = max(1, min(CELL, WIDEST_PICTURE // self.experts))
            for i, ids in enumerate(torch.from_numpy(evaluation.ids).long()):
                if self.top_k > 1:
                    even = (self.top_k - 1) / (self.experts - 1)
                    together = of.co_activation(ids, self.experts).numpy() / even
                    found[f"val/moe/{i:02d}/co_activation"] = heat_map(together, cell)
                if len(self.tokens.names) > 1:
                    domains = self._by_domain(ids).numpy().T * self.experts / self.top_k
                    found[f"val/moe/{i:02d}/domains"] = heat_map(domains, cell)
        return found

    def write(self) -> None:
        """Replace probe.npz whole."""
        if not self.evaluations:
            return
        choices = max(e.ids.shape[-1] for e in self.evaluations)
        with written_whole(self.path) as aside:
            np.savez_compressed(
                aside,
                steps=np.array([e.step for e in self.evaluations]),
                ids=np.stack([_widen(e.ids, choices) for e in self.evaluations]),
                saturation=self._saturation(),
                domain_counts=np.stack([e.domain_counts for e in self.evaluations]),
                domain_names=np.array(self.tokens.names),
                domains=self.tokens.domains.numpy(),
                token_ids=self.tokens.inputs.numpy(),
            )

    def _take_up(self, step: int) -> None:
        """Go on from what is kept up to a step; what a power cut has torn is lost."""
        layers, tokens, domains = len(self.layers), len(self.tokens.inputs), len(self.tokens.names)
        shapes = (layers, tokens), (layers, self.experts, domains)
        try:
            kept = read_probe(self.path.parent)
            if kept is None:
                return
            ids, counts = kept["ids"], kept["domain_counts"]
            if "steps" not in kept or (ids.shape[1:3], counts.shape[1:]) != shapes:
                reason = f"has no steps, or is not of {layers} layers and {tokens} tokens"
                raise BrokenFileError(self.path, reason)
        except BrokenFileError as error:
            logger.warning("%s: evaluations of steps up to %d are lost from it", error, step)
            return
        found = zip(kept["steps"].tolist(), ids, counts, strict=True)
        self.evaluations = [Evaluation(*one) for one in found if one[0] <= step]

    def _route(self) -> tuple[list[Tensor], list[Routing]]:
        """Inputs of every MoE layer and its routing, tokens in order."""
        with _recorded(self.layers) as records:
            for windows in self.tokens.windows.split(self.batch):
                self.task.route(windows.to(self.world.device))
        inputs = [torch.cat(record.inputs) for record in records]
        return inputs, [_joined(record.routings) for record in records]

    def _measure(self, routing: Routing, before: Tensor | None) -> dict[str, float]:
        ids, logits = routing.ids.cpu(), routing.logits
        found = {
            "router_entropy": of.router_entropy(logits),
            "confidence": of.confidence(logits),
            "importance_cv2": of.importance_cv2(routing.gates.cpu(), ids, self.experts),
            "co_activation": of.partner_share(ids, self.experts),
            "token_information": of.information(ids, self.tokens.inputs, self.experts),
        }
        if self.top_k < self.experts:
            found["boundary_margin"] = of.boundary_margin(logits, self.top_k)
        if len(self.tokens.names) > 1:
            found["domain_information"] = of.information(ids, self.tokens.domains, self.experts)
        if before is not None:
            found["fluctuation"] = of.fluctuation(ids, before.long())
        return found

    def _keep(self, step: int, routings: Sequence[Routing]) -> None:
        choices = max(routing.ids.shape[1] for routing in routings)
        small = np.min_scalar_type(-self.experts)
        all_ids = [_widen(routing.ids.cpu().numpy(), choices) for routing in routings]
        counts = [
            of.label_counts(
                routing.ids.cpu(), self.tokens.domains, self.experts, len(self.tokens.names)
            )
            for routing in routings
        ]
        evaluation = Evaluation(step, np.stack(all_ids).astype(small), torch.stack(counts).numpy())
        self.evaluations.append(evaluation)

    def _by_domain(self, ids: Tensor) -> Tensor:
        return of.specialization(ids, self.tokens.domains, self.experts, len(self.tokens.names))

    def _saturation(self) -> np.ndarray:
        """(evaluation, layer), against the last evaluation."""
        each = [torch.from_numpy(e.ids).long() for e in self.evaluations]
        return np.array(
            [[of.saturation(*pair) for pair in zip(ids, each[-1], strict=True)] for ids in each]
        )


class Record:
    """What enters and leaves a layer, call by call: a forward hook."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.routings: list[Routing] = []

    def __call__(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Routing]
    ) -> None:
        del layer
        self.inputs.append(inputs[0].flatten(0, -2))
        self.routings.append(output[1])


@contextmanager
def _recorded(layers: Sequence[Mixture]) -> Iterator[list[Record]]:
    """A record of each layer, of the calls inside."""
    records = [Record() for _ in layers]
    pairs = zip(layers, records, strict=True)
    hooks = [layer.register_forward_hook(record) for layer, record in pairs]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _joined(routings: Sequence[Routing]) -> Routing:
    """One routing of all tokens, as wide as the most choices that a token has."""
    choices = max(1, *(int((r.ids != NOBODY).sum(1).max()) for r in routings))
    spare = [choices - r.ids.shape[1] for r in routings]  # negative: cut off
    ids = [F.pad(r.ids, (0, n), value=NOBODY) for r, n in zip(routings, spare, strict=True)]
    gates = [F.pad(r.gates, (0, n)) for r, n in zip(routings, spare, strict=True)]
    return Routing(torch.cat(ids), torch.cat(gates), torch.cat([r.logits for r in routings]), {})


def _ranks_of(layer: MoE) -> int:
    """Those that hold a copy of all experts between them, from rank 0 on."""
    mine = layer.experts.mine
    return layer.num_experts // (mine.stop - mine.start)


def _widen(ids: np.ndarray, choices: int) -> np.ndarray:
    spare = choices - ids.shape[-1]
    return np.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, spare)], constant_values=NOBODY)


def _similarities(layer: Mixture, x: Float[Tensor, "tokens width"]) -> dict[str, float]:
    """How alike the experts' outputs are, after the shared map and, where there is one, before."""
    if layer.num_experts == 1:
        return {}
    x = x[torch.linspace(0, len(x) - 1, min(COMPARED_TOKENS, len(x))).long().to(x.device)]
    outputs = layer.expert_outputs(x)
    if not isinstance(layer, MoE) or not (layer.experts.down.shared and layer.experts.down.maps):
        return {"output_similarity": of.output_similarity(outputs)}
    return {
        "output_similarity": of.output_similarity(layer.experts.down.map(outputs)),
        "output_similarity_before_map": of.output_similarity(outputs),
    }


def _geometry(
    layer: Mixture, x: Float[Tensor, "tokens width"], routing: Routing
) -> dict[str, float]:
    """Directions of the router's input and logits, and how its rows lie along them, if it has."""
    found = of.geometry(x, routing.logits, layer.rows_of_products())
    # a table of experts has no logits that vary
    return {name: value for name, value in found.items() if math.isfinite(value)}
