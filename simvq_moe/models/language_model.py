"""A decoder-only language model whose feed-forward layers are mixtures of experts, all or some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simvq_moe.config.moe import MoEConfig
from simvq_moe.core.search.nearest import NotFiniteError
from simvq_moe.core.shares import keep_share, opened
from simvq_moe.core.streams import own_stream
from simvq_moe.hub import Pretrained
from simvq_moe.models.attention import Attention
from simvq_moe.models.blocks import Block, DenseBlock, MoEBlock, compiled_in_training, merge_gain
from simvq_moe.models.cross_entropy import mean_cross_entropy, token_cross_entropy
from simvq_moe.models.document_attention import Documents, documents_of
from simvq_moe.moe.losses import mean_losses
from simvq_moe.moe.routers.base import Routing

INITIAL_STD = 0.02


class LanguageModel(Pretrained):
    """Next-token prediction over windows of context + 1 tokens.

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width, layers, heads: of the transformer.
        moe: options of every mixture, also the weights of the means over layers of its losses.
        moe_every: the last of every so many blocks has a mixture, the others a dense network that
            costs a token as much; 0: all are dense.
        tied_head: the embedding is also the matrix of the head.
        qk_norm: queries and keys are normalized, each over its channels.
        depth_scaled: matrices that end a branch start smaller, by the root of twice the layers.
        activation_checkpointing: keep only the inputs of blocks for the backward pass, which runs
            them again (arXiv:1604.06174).
        document_mask: keep attention inside a document and count positions from its start; the
            end of each still predicts the first token of the next, so every token is a target.
    """

    depths = ("layers",)
    end_of_text: Tensor | None
    """The token that ends a document; None: attention sees the whole window."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int,
        layers: int,
        heads: int,
        moe: MoEConfig,
        moe_every: int = 1,
        tied_head: bool = True,
        qk_norm: bool = False,
        depth_scaled: bool = True,
        activation_checkpointing: bool = False,
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        self.context = context
        self.loss_weights, self.balance = moe.loss_weights, moe.balance
        self.activation_checkpointing = activation_checkpointing
        with own_stream():  # what this draws is drawn again below
            self.embedding = keep_share(nn.Embedding(vocabulary, width))
            self.blocks = nn.ModuleList(
                keep_share(
                    (MoEBlock if moe_every and i % moe_every == 0 else DenseBlock)(
                        width, heads, context, moe, vocabulary, qk_norm=qk_norm
                    )
                )
                for i in range(1, layers + 1)
            )
            self.norm = nn.RMSNorm(width)
            self.head = None if tied_head else keep_share(nn.Linear(width, vocabulary, bias=False))
        # a part of the model, because it is known with the tokenizer alone
        end = torch.tensor(0) if document_mask else None
        self.register_buffer("end_of_text", end)
        self._initialize((2 * layers) ** 0.5 if depth_scaled else 1.0)

    def forward(
        self, tokens: Int[Tensor, "batch window"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of windows of context + 1 tokens, and its terms by name."""
        x, losses = self.hidden_states(tokens[:, :-1])
        targets = tokens[:, 1:].flatten()
        cross_entropy = mean_cross_entropy(x.flatten(0, 1), self._head_matrix, targets)
        # a weight of 0 would still send zeros backward
        weights = {name: self.loss_weights.get(name, 0.0) for name in losses}
        weighted = [weight * losses[name] for name, weight in weights.items() if weight]
        terms = {"cross_entropy": cross_entropy}
        terms |= {f"{name}_loss": term for name, term in losses.items()}
        return sum(weighted, start=cross_entropy), terms

    def logits(
        self, tokens: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens vocabulary"], dict[str, Tensor]]:
        """Scores of the next token, float32 at least, and the MoE losses averaged over layers."""
        x, losses = self.hidden_states(tokens)
        return self._scores(x), losses

    def token_nats(self, tokens: Int[Tensor, "batch window"]) -> Float[Tensor, "batch predicted"]:
        """Cross entropy of every token but the first of each window; without a gradient."""
        x, _ = self.hidden_states(tokens[:, :-1])
        targets = tokens[:, 1:]
        nats = token_cross_entropy(x.flatten(0, 1), self._head_matrix, targets.flatten())
        return nats.view(targets.shape)

    def hidden_states(
        self, tokens: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens width"], dict[str, Tensor]]:
        """What the head reads, and the MoE losses averaged over layers."""
        x, routings = self._run_blocks(tokens)
        # ranks evaluate different numbers of batches, so no collective call may run there
        all_ranks = self.training
        losses = (
            mean_losses(routings, all_ranks=all_ranks, balance=self.balance.loss)
            if routings
            else {}
        )
        return self.norm(x), losses

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch beginning"],
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        ranges: Sequence[range] = (),
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch total"]:
        """tokens and a continuation, each new token drawn after at most `context` before it.

        Every step runs the whole window again, without a cache of keys and values: what a router
        chooses, or a capacity drops, may depend on all tokens of a batch. Runs in evaluation mode,
        so that nothing counts as usage; ranks that share experts must call it together.

        Args:
            new_tokens: length of the continuation.
            temperature: of the softmax that is drawn from; 0: the best token.
            top_k: draw from so many best tokens; 0: from all.
            ranges: the ids that new tokens are drawn from, in turn; (): all.
            generator: source of random numbers, on any device; None: torch's own.

        Raises:
            ValueError: the beginning is empty.
        """
        if not tokens.shape[1]:
            raise ValueError("generate: tokens (batch, 0) is empty: give at least one token")
        was_training = self.training
        self.eval()
        ranges = ranges or (range(self.embedding.num_embeddings),)
        for i in range(new_tokens):
            x, _ = self._run_blocks(tokens[:, -self.context :])
            ids = ranges[i % len(ranges)]
            scores = self._scores(self.norm(x[:, -1]))[:, ids.start : ids.stop]
            drawn = draw(scores, temperature, top_k, generator)
            tokens = torch.cat([tokens, drawn.to(tokens) + ids.start], dim=1)
        self.train(was_training)
        return tokens

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """torch.compile every block for training, in place: names of weights stay the same.

        A dense block is one graph, and so is a block with a mixture in bfloat16; of other mixtures
        the sizes depend on the data, and only the attention before them is compiled. That also
        holds for mixtures under activation checkpointing, because a graph could not tell whether it
        runs for the second time and would count the usage twice. Call it once the weights have
        the precision of the training.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            counts_twice = self.activation_checkpointing and isinstance(block, MoEBlock)
            whole = block.is_one_graph and not counts_twice
            (block if whole else block.attention).compile(backend=backend)

    @torch.no_grad()
    def merge_norms_(self) -> None:
        """Merge the gain of each norm into the matrices that read its output, which leaves ones.

        The gain before a tied head stays, because its matrix is also the embedding.

        Raises:
            ValueError: a router is not linear in its input, or a map is not folded yet.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.merge_norms_()
        if self.head is not None:
            merge_gain(self.norm, self.head.weight)

    def _run_blocks(
        self, tokens: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Routing]]:
        x = self.embedding(tokens)
        documents = self._documents(tokens)
        again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        routings = []
        for block in self.blocks:
            if again:
                x, routing = checkpoint(block, x, tokens, documents, use_reentrant=False)
            else:
                x, routing = compiled_in_training(block, x, tokens, documents)
            routings += [] if routing is None else [routing]
        return x, routings

    def _documents(self, tokens: Int[Tensor, "batch tokens"]) -> Documents | None:
        if self.end_of_text is None:
            return None
        attention = self.blocks[0].attention
        assert isinstance(attention, Attention)
        return documents_of(tokens, self.end_of_text, attention.channels)

    @property
    def _head_matrix(self) -> Float[Tensor, "vocabulary width"]:
        return self.embedding.weight if self.head is None else self.head.weight

    def _scores(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        scores = F.linear(x, self._head_matrix)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    @torch.no_grad()
    def _initialize(self, smaller: float) -> None:
        """N(0, 0.02) matrices (GPT-2), those that end a branch smaller by a factor."""
        ending = INITIAL_STD / smaller
        with opened(self.embedding):
            self.embedding.weight.normal_(std=INITIAL_STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            with opened(block):
                block.reset(INITIAL_STD, ending)
        if self.head is not None:
            with opened(self.head):
                self.head.weight.normal_(std=INITIAL_STD)


def draw(
    scores: Float[Tensor, "batch vocabulary"],
    temperature: float,
    top_k: int,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch 1"]:
    """A token for each row of scores, see `LanguageModel.generate`.

    Raises:
        NotFiniteError: a score is NaN, or infinite.
    """
    if temperature == 0:
        return scores.argmax(-1, keepdim=True)
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    shares = (scores / temperature).softmax(-1)
    if not shares.isfinite().all():
        raise NotFiniteError("the scores of the next token are not finite")
    if generator is not None:
        shares = shares.to(generator.device)
    return shares.multinomial(1, generator=generator)
