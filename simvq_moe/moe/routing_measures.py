"""Router measures on tokens that stay the same: how settled, how sure and how specialized it is.

ids are (tokens, choices), best first, as in `Routing`; an open choice (`NOBODY`) counts for nobody.
Everything is computed in float64. `uniform_routing` draws what pure chance would choose.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from simvq_moe.core.ids import NOBODY, as_ids
from simvq_moe.moe.routers.base import count

SHUFFLES = 4
"""Random orders of the labels that estimate what chance alone would tell."""


def saturation(
    ids: Integer[Tensor, "tokens choices"], final: Int[Tensor, "tokens final_choices"]
) -> float:
    """Mean |E_t ∩ E_T| / k, the share of the final experts of a token that it has already.

    "Router saturation" of OLMoE (arXiv:2409.02060, section 5.1). 1: settled; k/N: chance. With open
    choices the sums over tokens are divided, sum |E_t ∩ E_T| / sum |E_T|.
    """
    settled = (final[:, :, None] == ids[:, None, :]).any(-1) & (final != NOBODY)
    return int(settled.sum()) / max(int((final != NOBODY).sum()), 1)


def fluctuation(
    ids: Integer[Tensor, "tokens choices"], before: Int[Tensor, "tokens choices_before"]
) -> float:
    """Share of tokens whose first choice is not the one it was before.

    StableMoE (arXiv:2204.08396) follows the one target expert of a token; of k experts the first is
    taken. 0: stable; 1 - 1/N: chance. A token that nobody takes either time is left out.
    """
    first, earlier = ids[:, 0], before[:, 0]
    taken = (first != NOBODY) | (earlier != NOBODY)
    return int((first != earlier).sum()) / max(int(taken.sum()), 1)


def co_activation(
    ids: Integer[Tensor, "tokens choices"], experts: int
) -> Float[Tensor, "experts experts"]:
    """N_ij / N_i: of the tokens of expert i, the share that expert j has as well.

    OLMoE (arXiv:2409.02060, section 5.2), over all pairs of a token's experts. Rows sum to k - 1;
    even chance is (k - 1) / (N - 1) everywhere. The diagonal and the rows of unused experts are 0.
    """
    pairs = _pairs(ids, experts)
    together = pairs.double() / pairs.diagonal().clamp_min(1)[:, None]
    return together.fill_diagonal_(0)


def partner_share(ids: Integer[Tensor, "tokens choices"], experts: int) -> float:
    """sum_i max_(j != i) N_ij / sum_i N_i: co-activation with the most frequent partner.

    The mean over experts, weighted by their tokens, so that an expert with few tokens, whose
    largest share is large by chance, does not count much. 0: nobody has a partner (top-1); 1: every
    expert has one that sees all its tokens. Chance is above (k - 1) / (N - 1), because it is a
    maximum: measure `uniform_routing`.
    """
    pairs = _pairs(ids, experts)
    tokens = int(pairs.diagonal().sum())
    return int(pairs.clone().fill_diagonal_(0).amax(1).sum()) / max(tokens, 1)


def label_counts(
    ids: Integer[Tensor, "tokens choices"],
    labels: Integer[Tensor, " tokens"],
    experts: int,
    number: int,
) -> Int[Tensor, "experts labels"]:
    """How many tokens of each of `number` labels each expert has."""
    ids, labels = as_ids(ids), as_ids(labels, "labels")
    cells = torch.where(ids == NOBODY, NOBODY, ids * number + labels[:, None])
    return count(cells, experts * number).view(experts, number)


def specialization(
    ids: Integer[Tensor, "tokens choices"],
    labels: Integer[Tensor, " tokens"],
    experts: int,
    number: int,
) -> Float[Tensor, "experts labels"]:
    """N_(i,D) / N_D: of the tokens with label D, the share that has expert i among its k.

    OLMoE's domain specialization for labels that are domains, its vocabulary specialization for
    token ids (arXiv:2409.02060, sections 5.3 and 5.4). Even chance is k/N; columns sum to k. The
    column of a label without tokens is 0.
    """
    tokens = count(labels, number).clamp_min(1)
    return label_counts(ids, labels, experts, number) / tokens.double()


def information(
    ids: Integer[Tensor, "tokens choices"], labels: Integer[Tensor, " tokens"], experts: int
) -> float:
    """Bits that the expert of an assignment tells about its token's label, above chance.

    I(E; D) = sum p(i,D) log2(p(i,D) / (p(i) p(D))) over assignments, the specialization that
    Mod-Squad rewards (arXiv:2212.08066), less its mean over random orders of the
    labels, because few tokens look specialized by chance (the adjustment of Vinh et al., JMLR
    2010). 0: chance; at most the lesser of both entropies. The orders are the same at every call.
    """
    dense = labels.unique(return_inverse=True)[1]
    number = int(dense.max()) + 1
    generator = torch.Generator().manual_seed(0)
    by_chance = 0.0
    for _ in range(SHUFFLES):
        order = torch.randperm(len(labels), generator=generator, device=generator.device)
        order = order.to(labels.device)
        by_chance += _mutual_information(label_counts(ids, dense[order], experts, number))
    told = _mutual_information(label_counts(ids, dense, experts, number))
    return told - by_chance / SHUFFLES


def output_similarity(outputs: Float[Tensor, "experts tokens width"]) -> float:
    """Mean cosine of the outputs of two different experts for the same token, over all pairs.

    Lo et al. (arXiv:2406.18219). 1: all experts say the same; 0: unrelated directions;
    a zero output resembles nothing.

    Raises:
        ValueError: fewer than two experts.
    """
    experts = len(outputs)
    if experts < 2:
        raise ValueError(f"output_similarity: {experts} experts have no pair: give at least 2")
    directions = torch.nn.functional.normalize(outputs.double(), dim=-1)
    # the squared norm of a sum holds every pair twice, and each direction with itself
    alone = directions.square().sum((0, 2))
    pairs = directions.sum(0).square().sum(-1) - alone
    return float(pairs.mean()) / (experts * (experts - 1))


def router_entropy(logits: Float[Tensor, "tokens experts"]) -> float:
    """Mean over tokens of H(p) / ln N, p the softmax of all logits. 1: undecided; 0: certain."""
    experts = logits.shape[1]
    entropy = torch.special.entr(logits.double().softmax(-1)).sum(-1).mean()
    return float(entropy) / math.log(experts) if experts > 1 else 0.0


def confidence(logits: Float[Tensor, "tokens experts"]) -> float:
    """Mean p_1 - p_2 of the two largest of the softmax of all logits. 0: undecided; 1: certain."""
    top = logits.double().softmax(-1).topk(min(2, logits.shape[1])).values
    return float((top[:, 0] - top[:, 1:].sum(-1)).mean())


def boundary_margin(logits: Float[Tensor, "tokens experts"], top_k: int) -> float:
    """Mean l_k - l_(k+1) of the sorted logits: what a change of the choice has to overcome.

    Biases of the choice are left out.

    Raises:
        ValueError: every expert is chosen, so that there is no boundary.
    """
    experts = logits.shape[1]
    if top_k >= experts:
        raise ValueError(f"boundary_margin: top_k {top_k} of {experts} experts has no boundary")
    top = logits.double().topk(top_k + 1).values
    return float((top[:, -2] - top[:, -1]).mean())


def importance_cv2(
    gates: Float[Tensor, "tokens choices"], ids: Integer[Tensor, "tokens choices"], experts: int
) -> float:
    """Squared coefficient of variation of the experts' importance, the sum of their gates.

    Shazeer et al. (arXiv:1701.06538, section 4). 0: even; N - 1: one expert only.
    """
    ids = as_ids(ids)
    taken = torch.where(ids == NOBODY, 0, gates.double()).reshape(-1)
    importance = taken.new_zeros(experts).index_add_(0, ids.clamp_min(0).reshape(-1), taken)
    mean = importance.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return float(importance.var(correction=0) / mean.square())


def uniform_routing(
    tokens: int, experts: int, top_k: int, seed: int = 0
) -> Int[Tensor, "tokens choices"]:
    """ids of k different experts a token, drawn evenly: what a measure gives for it is its null."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, device=generator.device)
    return scores.topk(top_k).indices


def _pairs(ids: Tensor, experts: int) -> Int[Tensor, "experts experts"]:
    """Tokens that two experts share; on the diagonal those of an expert."""
    ids = as_ids(ids)
    one, other = ids[:, :, None], ids[:, None, :]
    cells = torch.where((one == NOBODY) | (other == NOBODY), NOBODY, one * experts + other)
    return count(cells, experts**2).view(experts, experts)


def _mutual_information(counts: Int[Tensor, "rows columns"]) -> float:
    """Mutual information of rows and columns of a table of counts, in bits."""
    joint = counts.double() / counts.sum().clamp_min(1)
    entropies = [torch.special.entr(p).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    return float(entropies[0] + entropies[1] - entropies[2]) / math.log(2)


def geometry(
    x: Float[Tensor, "tokens width"],
    logits: Float[Tensor, "tokens experts"],
    rows: Float[Tensor, "experts width"] | None = None,
) -> dict[str, float]:
    """How many directions a router's input and its logits have, by their covariance over tokens,
    and how its rows, if it has any, lie along them.

    input_rank and logits_rank: effective rank, exp of the entropy of the eigenvalues' shares
    (Roy and Vetterli, EUSIPCO 2007); logits lose one to the mean over experts, which no choice
    see. input_condition: largest eigenvalue over the least. input_mean_share: squared length of
    the mean over the mean squared length. row_exponent: see there.
    """
    x, logits = x.double(), logits.double()
    of_input = covariance(x)
    variances = torch.linalg.eigvalsh(of_input).clamp_min(0)
    compared = torch.linalg.eigvalsh(covariance(logits - logits.mean(1, keepdim=True)))
    length = x.square().sum(1).mean()
    found = {
        "input_rank": _effective_rank(variances),
        "input_condition": float(variances[-1] / variances[0]),
        "input_mean_share": float(x.mean(0).square().sum() / length),
        "logits_rank": _effective_rank(compared.clamp_min(0)),
    }
    return found if rows is None else found | {"row_exponent": row_exponent(of_input, rows)}


def row_exponent(
    of_input: Float[Tensor, "width width"], rows: Float[Tensor, "experts width"]
) -> float:
    """p, by least squares, in |R u| ~ lambda^p over the eigenvectors u of the input's covariance.

    Above 0 rows are strong where the input already varies; below 0 they tell weak directions apart.
    Eigenvectors with less than 1e-6 of the largest eigenvalue lambda are left out, because that is
    rounding; nan where fewer than two are left.
    """
    variances, axes = torch.linalg.eigh(of_input)
    strengths = (rows.double() @ axes).norm(dim=0)
    kept = (variances > 1e-6 * variances[-1]) & (strengths > 0)
    a, b = variances[kept].log(), strengths[kept].log()
    if len(a) < 2:
        return math.nan
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


def covariance(x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "channels channels"]:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def _effective_rank(variances: Float[Tensor, " channels"]) -> float:
    return float(torch.special.entr(variances / variances.sum()).sum().exp())
