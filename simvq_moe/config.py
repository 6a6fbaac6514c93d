"""The configuration: frozen dataclasses with their defaults, and what can't run together.

A value or combination that can't run raises `ConfigError` before anything is written: one line
that names the key, the value and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Literal

from simvq_moe.merging import ConfigError, flatten


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    source: str | None = None
    """A folder, or an embedded set: "photos" (images), "python-stdlib" (text), "spoken-characters"
    (audio); "asterisk": the prompts of Debian's package; None: the embedded set of the task."""
    cache_dir: str = ".cache"
    """Folder of what is derived from the source once: tokenizer and token files."""
    seed: int = 0
    """Seed of the crops: the data set stays the same when the run's seed changes."""
    image_size: int = 32
    """Pixels a side of a crop."""
    crops: int = 18_000
    """Training crops."""
    held_out_crops: int = 1_026
    """Held-out crops, from parts of images or recordings that training never sees."""
    sample_rate: int = 16_000
    """Hz of audio; recordings of another rate are resampled."""
    audio_seconds: float = 0.2
    """Length of an audio crop; shorter recordings are left out."""
    vocabulary: int = 1_024
    """Tokens of the byte-level BPE vocabulary, trained on the training documents."""
    context: int = 128
    """Tokens a sequence."""


@dataclass(frozen=True)
class QuantizerConfig:
    """The codebook between encoder and decoder."""

    kind: Literal[
        "vq", "ema", "simvq", "cosine_vq", "group_vq", "mlp_vq", "fsq", "lfq", "bsq", "ibq"
    ] = "simvq"
    """simvq: frozen rows under one shared map; the others are baselines, see quantizers/."""
    codes: int = 512
    """Number of codes."""
    width: int = 32
    """Channels of a code."""
    residual_levels: int = 1
    """Quantizers in a row, each for what the ones before it left over."""
    transform: Literal["none", "diagonal", "linear"] = "linear"
    """simvq: shape of the shared map W."""
    train_base: bool = False
    """simvq: learn the base rows beside W."""
    bias: bool = False
    """simvq: one learned shift of all codes."""
    base_width: int | None = None
    """simvq: channels of a base row; None: width."""
    groups: int | None = None
    """group_vq: number of blocks of codes, each with a map of its own."""
    levels: tuple[int, ...] = ()
    """fsq: values of each channel; width is their number and codes their product."""
    init: Literal["default", "data", "kmeans"] = "default"
    """From the first batch: data sets W and a bias (simvq, group_vq), kmeans the codes (vq, ema,
    cosine_vq)."""
    gradient: Literal["straight_through", "rotation", "diveq"] = "straight_through"
    """How the decoder's gradient reaches the encoder."""
    codebook_weight: float = 1.0
    """Weight of |e - sg z|^2, where codes are learned by gradient."""
    commitment_weight: float = 0.25
    """Weight of |z - sg e|^2."""
    decay: float = 0.99
    """ema: weight of the past."""
    restart: float = 0.0
    """vq, ema, cosine_vq: a code drawn less often a step than this, on average, restarts at a
    latent of the batch; less than 1, and 0: never."""


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Convolutional encoder and decoder around the quantizer."""

    hidden: int = 32
    """Channels of the convolutions."""
    downsamplings: int = 2
    """Stride-2 convolutions: a token covers 2^downsamplings pixels a side."""
    residual_blocks: int = 1
    """Residual blocks at the lowest resolution, in the encoder and in the decoder."""


@dataclass(frozen=True)
class AudioTokenizerConfig:
    """Convolutional encoder and decoder of waveforms around the quantizer, and their losses."""

    hidden: int = 32
    """Channels of the first convolution; every stride doubles them."""
    strides: tuple[int, ...] = (2, 4, 5, 8)
    """Of the strided convolutions: a token covers their product in samples."""
    dilations: tuple[int, ...] = (1, 3, 9)
    """Of the residual units before every strided convolution and after its mirror image."""
    loss_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    """Samples of a frame of the spectrograms in the loss."""
    waveform_weight: float = 1.0
    """Weight of the mean absolute error of samples."""
    spectral_weight: float = 1.0
    """Weight of the distance of magnitudes and their logarithms."""
    mel_weight: float = 1.0
    """Weight of the distance of log10 mel bands."""
    adversarial_weight: float = 0.0
    """Weight of the discriminators' verdict; 0: there are none."""
    feature_weight: float = 2.0
    """Weight of the distance of their activations."""
    adversarial_start: int = 0
    """Steps before which discriminators neither judge nor learn."""
    discriminator_hidden: int = 32
    """Channels of their first layers."""
    discriminator_periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """Samples; one discriminator of the waveform each."""
    discriminator_windows: tuple[int, ...] = (512, 1024, 2048)
    """Samples of a frame; one discriminator of the spectrum each."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers."""

    experts: int = 64
    """Experts of a layer."""
    top_k: int = 4
    """Experts of a token."""
    hidden: int = 16
    """Hidden channels of an expert."""
    expert: Literal["gelu", "swiglu"] = "gelu"
    """Two projections around a GELU, or three around a gated SiLU."""
    shared_experts: int = 0
    """Experts of the same size that every token goes through beside its choice."""
    capacity_factor: float = 0.0
    """Assignments that an expert takes over its fair share of a rank's batch; 0: dropless."""
    router: Literal[
        "topk",
        "noisy_topk",
        "cosine",
        "hyper",
        "distance",
        "self_selecting",
        "expert_choice",
        "hash",
    ] = "topk"
    """How a token's experts are chosen; topk: by x R^T; the others are baselines, see moe/."""
    gates: Literal["softmax_topk", "topk_softmax", "sigmoid"] = "topk_softmax"
    """Softmax over all experts before the choice, softmax over the chosen, or normalized sigmoids
    of the chosen; the gates of the last two sum to 1."""
    router_map: Literal["none", "diagonal", "linear", "low_rank"] = "none"
    """Shared map W of the router's rows: logits = x (Q W)^T."""
    router_base_width: int | None = None
    """Channels of Q; None: those of the model."""
    train_router_base: bool = True
    """Learn Q, or the keys of self_selecting; False without a map: a frozen random router."""
    router_projection: int | None = None
    """cosine: channels in which tokens and experts are compared; None: half the experts."""
    router_codebook_weight: float = 1.0
    """distance: weight of |r - sg x|^2 for the chosen rows r."""
    router_commitment_weight: float = 0.25
    """distance: weight of |x - sg r|^2 for the chosen rows r."""
    router_init: Literal["default", "data"] = "default"
    """data: set from the first batch the shared map of distance (router_map, and a bias), or of
    self_selecting (expert_in_map)."""
    self_selecting_rank: int = 8
    """self_selecting: rows of an expert's key, whose activation's norm is its score."""
    centre_router_input: bool = False
    """Take a running mean over tokens off the router's input; momentum 0.99 a step."""
    expert_out_map: Literal["none", "diagonal", "linear", "low_rank", "separate"] = "none"
    """Map W after the gated sum of experts: y = (sum g_i E_i(x)) W; separate: one for each."""
    train_expert_out_base: bool = True
    """Learn the experts' last projections beside the map."""
    expert_out_bias: bool = False
    """One learned vector added to the sum."""
    expert_in_map: Literal["none", "diagonal", "linear", "low_rank", "separate"] = "none"
    """Map A before the experts: E_i(x A); separate: one for each."""
    train_expert_in_base: bool = True
    """Learn the experts' first projections beside the map."""
    map_rank: int = 8
    """Rank of low_rank maps W = I + A B."""
    dispatch: Literal["sorted", "deepspeed_capacity"] = "sorted"
    """Ours, without padding, or DeepSpeed's own layer as a baseline: padded to the capacity, or
    without one to the fullest expert."""
    expert_parallel: int = 1
    """Ranks that share the experts of a layer, which are exchanged by all-to-all; 1: every rank
    has all of them."""
    balance: Literal["none", "aux", "loss_free", "quantile"] = "none"
    """aux: the load-balance loss N sum f_i P_i of each layer (arXiv:2101.03961); loss_free and
    quantile: biases that change the choice alone, in steps (arXiv:2408.15664) or to even loads."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss."""
    bias_update_rate: float = 0.001
    """loss_free: change of a bias in a step, of scores from 0 to 1."""
    z_loss_weight: float = 0.0
    """Weight of the mean squared logsumexp of the logits (arXiv:2202.08906)."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """Decoder-only transformer whose feed-forward layers are mixtures of experts, all or some."""

    width: int = 64
    """Channels of the residual stream."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    moe_every: int = 1
    """The last of every so many blocks has a mixture, the others one network as wide as the experts
    that a token meets, so that they cost as much; 0: all blocks are dense, the baseline."""
    tied_head: bool = True
    """The embedding is also the matrix of the head; otherwise it has its own."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors and shared maps have none."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    final_lr_ratio: float = 1.0
    """Learning rate at the last step over the peak, reached by a cosine; 1: constant."""
    map_lr_multiplier: float = 1.0
    """Factor on the learning rate of every shared map W."""
    router_lr_multiplier: float = 1.0
    """Factor on the learning rate of everything in routers but their maps."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop and its engine."""

    steps: int = 800
    """Optimizer steps."""
    batch_size: int = 32
    """Samples of one optimizer step, over all ranks."""
    accumulation: int = 1
    """Micro-batches of a rank and step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward and backward; the optimizer keeps fp32 weights."""
    zero_stage: Literal[1, 2] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states over ranks, 2 gradients as well."""
    deepspeed_config: str | None = None
    """JSON file with further settings of DeepSpeed, such as offloading; those that follow from this
    config can't be in it."""
    clip: float = 0.0
    """Largest global norm of the gradient; 0: no clipping."""
    activation_checkpointing: bool = False
    """language_model: keep only the inputs of blocks for the backward pass, which runs them again:
    less memory, a third more arithmetic."""
    compile: bool = False
    """language_model: torch.compile what has sizes known beforehand, minutes at the first step:
    dense blocks, with bf16 mixtures as well, otherwise attention."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; also the window of the usage counts."""
    eval_every: int = 200
    """Steps between evaluations on the held-out set; the last step is always evaluated."""
    eval_batch_size: int = 64
    """Held-out samples a rank evaluates at a time."""
    probe_tokens: int = 8_192
    """Held-out tokens whose routing is followed over evaluations; 0: none. probe.npz keeps their
    choices: evaluations x layers x tokens x top_k bytes, or twice that, before compression."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0: none."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    task: Literal["image_tokenizer", "audio_tokenizer", "language_model"] = "image_tokenizer"
    """What is trained."""
    name: str = "run"
    """The run's folder under runs_dir; the same name resumes."""
    arm: str | None = None
    """Name in comparisons; None: the run's name."""
    seed: int = 0
    """Seed of initial weights and data order."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    data: DataConfig = field(default_factory=DataConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    audio_tokenizer: AudioTokenizerConfig = field(default_factory=AudioTokenizerConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def check(config: Config) -> None:
    """Raise `ConfigError` for a config that can't run, whatever the number of ranks."""
    for message in _problems(config):
        raise ConfigError(message)


def check_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where the global batch or the experts do not divide over the ranks."""
    if world_size % config.moe.expert_parallel:
        raise ConfigError(
            f"moe.expert_parallel {config.moe.expert_parallel} does not divide {world_size} "
            f"rank{'' if world_size == 1 else 's'}: launch a multiple of it, or lower it"
        )
    parts = world_size * config.train.accumulation
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} does not divide by {world_size} ranks x "
            f"train.accumulation {config.train.accumulation} = {parts}: "
            f"use a multiple of {parts}, or another number of ranks"
        )


def on_one_rank(config: Config) -> Config:
    """The same model for a process of its own."""
    return replace(config, moe=replace(config.moe, expert_parallel=1))


def _problems(config: Config) -> Iterator[str]:
    yield from _below_minimum(config)
    moe, lm, q = config.moe, config.language_model, config.quantizer
    if moe.top_k > moe.experts:
        yield (
            f"moe.top_k {moe.top_k} > moe.experts {moe.experts}: "
            "lower moe.top_k or raise moe.experts"
        )
    if moe.dispatch == "deepspeed_capacity":
        yield from _baseline_problems(moe)
    yield from _router_problems(moe)
    if moe.experts % moe.expert_parallel:
        yield (
            f"moe.experts {moe.experts} does not divide by moe.expert_parallel "
            f"{moe.expert_parallel}: change one of them"
        )
    if lm.width % lm.heads or (lm.width // lm.heads) % 2:
        yield (
            f"language_model.width {lm.width} / language_model.heads {lm.heads} must be a whole "
            "even number for rotary positions: change one of them"
        )
    if lm.moe_every > lm.layers:
        yield (
            f"language_model.moe_every {lm.moe_every} > language_model.layers {lm.layers}: no block "
            "would have a mixture: lower it, or use 0 for dense blocks"
        )
    for name in ("activation_checkpointing", "compile"):
        if getattr(config.train, name) and config.task != "language_model":
            yield f"train.{name} True with task {config.task!r}: only 'language_model' has it: drop it"
    yield from _quantizer_problems(q)
    if q.kind == "simvq" and q.transform != "linear" and q.base_width not in (None, q.width):
        yield (
            f"quantizer.base_width {q.base_width} != quantizer.width {q.width} with "
            f"quantizer.transform {q.transform!r}: only 'linear' changes the width"
        )
    rows = lm.width
    if moe.router == "cosine":
        rows = moe.router_projection or max(1, moe.experts // 2)
    if moe.router_map != "linear" and moe.router_base_width not in (None, rows):
        yield (
            f"moe.router_base_width {moe.router_base_width} with moe.router_map "
            f"{moe.router_map!r}: set moe.router_map to 'linear' or drop it"
        )
    if config.data.image_size % 2**config.image_tokenizer.downsamplings:
        yield (
            f"data.image_size {config.data.image_size} does not divide by "
            f"2^{config.image_tokenizer.downsamplings}: lower image_tokenizer.downsamplings"
        )
    yield from _audio_problems(config)
    if not re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", config.name) or ".." in config.name.split("/"):
        yield f"name {config.name!r}: use letters, digits and . _ + = -, with / between folders"


OF_DEEPSPEED = {
    *("experts", "top_k", "hidden", "expert", "capacity_factor", "gates", "dispatch", "balance"),
    *("balance_weight", "z_loss_weight"),
}
"""Options that DeepSpeed's own layer has as well."""


def _baseline_problems(moe: MoEConfig) -> Iterator[str]:
    for name, default in asdict(MoEConfig()).items():
        value = getattr(moe, name)
        if name not in OF_DEEPSPEED and value != default:
            yield (
                f"moe.{name} {value} with moe.dispatch 'deepspeed_capacity': DeepSpeed's layer has "
                "no such option: drop it, or use moe.dispatch 'sorted'"
            )
    if moe.balance not in ("none", "aux"):
        yield (
            f"moe.balance {moe.balance!r} with moe.dispatch 'deepspeed_capacity': use 'none' or "
            "'aux', or moe.dispatch 'sorted'"
        )
    convention = "topk_softmax" if moe.top_k > 1 else "softmax_topk"
    if moe.gates != convention:
        yield (
            f"moe.gates {moe.gates!r} with moe.dispatch 'deepspeed_capacity' and moe.top_k "
            f"{moe.top_k}: DeepSpeed's gates are {convention!r}: set that"
        )


OF_ROWS = ("topk", "noisy_topk", "cosine", "distance", "expert_choice")
SCORING = (*OF_ROWS, "hyper", "self_selecting")
OF_ROUTERS = {
    "router_map": OF_ROWS,
    "router_base_width": OF_ROWS,
    "train_router_base": (*OF_ROWS, "self_selecting"),
    "router_projection": ("cosine",),
    "router_codebook_weight": ("distance",),
    "router_commitment_weight": ("distance",),
    "router_init": ("distance", "self_selecting"),
    "self_selecting_rank": ("self_selecting",),
    "centre_router_input": SCORING,
    "z_loss_weight": SCORING,
    "balance": tuple(kind for kind in SCORING if kind != "expert_choice"),
    "capacity_factor": (*(kind for kind in SCORING if kind != "expert_choice"), "hash"),
}
"""Routers that have the option; for others only its default is accepted."""


def _router_problems(moe: MoEConfig) -> Iterator[str]:
    for name, kinds in OF_ROUTERS.items():
        value = getattr(moe, name)
        if moe.router not in kinds and value != getattr(MoEConfig(), name):
            yield (
                f"moe.{name} {value} means nothing to moe.router {moe.router!r}: drop it, or use "
                f"router {' or '.join(kinds)}"
            )
    if moe.router == "expert_choice" and moe.gates != "softmax_topk":
        yield (
            f"moe.gates {moe.gates!r} with moe.router 'expert_choice': its gates are the softmax "
            "over all experts: set 'softmax_topk'"
        )
    if moe.router == "hash" and moe.gates == "softmax_topk":
        yield (
            "moe.gates 'softmax_topk' with moe.router 'hash': its gates are equal and sum to 1: "
            "set 'topk_softmax'"
        )
    if moe.router == "self_selecting" and moe.expert_in_map == "separate":
        yield (
            "moe.expert_in_map 'separate' with moe.router 'self_selecting': its keys are separate "
            "already: use a shared map or 'none'"
        )
    started = "expert_in_map" if moe.router == "self_selecting" else "router_map"
    if moe.router_init == "data" and getattr(moe, started) not in ("linear", "diagonal"):
        yield (
            f"moe.router_init 'data' sets moe.{started}, which is {getattr(moe, started)!r}: use "
            "'linear' or 'diagonal'"
        )
    if moe.balance == "quantile" and moe.top_k == moe.experts:
        yield (
            f"moe.balance 'quantile' with moe.top_k {moe.top_k} of moe.experts {moe.experts}: "
            "every expert is chosen: lower moe.top_k, or use moe.balance 'none'"
        )
    if moe.balance != "loss_free" and moe.bias_update_rate != MoEConfig().bias_update_rate:
        yield (
            f"moe.bias_update_rate {moe.bias_update_rate} with moe.balance {moe.balance!r}: drop "
            "it, or use moe.balance 'loss_free'"
        )


BELONGS_TO = {
    "transform": ("simvq",),
    "train_base": ("simvq",),
    "bias": ("simvq",),
    "base_width": ("simvq",),
    "groups": ("group_vq",),
    "levels": ("fsq",),
    "gradient": ("vq", "ema", "simvq", "cosine_vq", "group_vq", "mlp_vq"),
    "decay": ("ema",),
    "restart": ("vq", "ema", "cosine_vq"),
}
"""Kinds of quantizers that have the option; for others only its default is accepted."""
WHY_NOT = {"restart": ", whose codes have no free rows: under a map or on a grid none moves alone"}
"""Why an option means nothing to the others, where the name does not say."""
STARTS = {"data": ("simvq", "group_vq"), "kmeans": ("vq", "ema", "cosine_vq")}


def _quantizer_problems(q: QuantizerConfig) -> Iterator[str]:
    for name, kinds in BELONGS_TO.items():
        value = getattr(q, name)
        if q.kind not in kinds and value != getattr(QuantizerConfig(), name):
            yield (
                f"quantizer.{name} {value} means nothing to quantizer.kind {q.kind!r}"
                f"{WHY_NOT.get(name, '')}: drop it, or use kind {' or '.join(kinds)}"
            )
    if not q.restart < 1:
        yield (
            f"quantizer.restart {q.restart} is not below 1, the draws a step that a restarted code "
            "is given: use less, such as 0.1"
        )
    if not q.decay < 1:
        yield f"quantizer.decay {q.decay} is not below 1: use less, or the codes never move"
    if q.init != "default" and q.kind not in STARTS[q.init]:
        yield (
            f"quantizer.init {q.init!r} does not go with quantizer.kind {q.kind!r}: "
            f"drop it, or use kind {' or '.join(STARTS[q.init])}"
        )
    if q.kind == "fsq" and not q.levels:
        yield (
            "quantizer.levels () with quantizer.kind 'fsq': give values of each channel, such as "
            "--quantizer.levels 8 8 8 --quantizer.width 3 --quantizer.codes 512"
        )
    if q.kind == "fsq" and (len(q.levels), prod(q.levels)) != (q.width, q.codes):
        yield (
            f"quantizer.levels {q.levels} need quantizer.width {len(q.levels)} and "
            f"quantizer.codes {prod(q.levels)}, not {q.width} and {q.codes}"
        )
    if q.kind in ("lfq", "bsq") and q.codes != 2**q.width:
        yield (
            f"quantizer.codes {q.codes} must be 2^quantizer.width = {2**q.width} with "
            f"quantizer.kind {q.kind!r}: a channel is a bit"
        )
    if q.residual_levels > 1 and q.gradient == "diveq":
        yield (
            "quantizer.gradient 'diveq' knows no quantizer.residual_levels "
            f"{q.residual_levels}: use 'straight_through' or 'rotation'"
        )
    if q.kind == "group_vq" and (q.groups is None or q.codes % q.groups):
        yield (
            f"quantizer.groups {q.groups} must divide quantizer.codes {q.codes} with "
            "quantizer.kind 'group_vq': set it"
        )


OF_DISCRIMINATORS = (
    *("feature_weight", "adversarial_start", "discriminator_hidden"),
    *("discriminator_periods", "discriminator_windows"),
)
"""Options of the audio tokenizer that mean nothing without discriminators."""


def _audio_problems(config: Config) -> Iterator[str]:
    audio, data = config.audio_tokenizer, config.data
    for name, least in (
        *(("strides", 2), ("dilations", 1), ("loss_windows", 32)),
        *(("discriminator_periods", 2), ("discriminator_windows", 32)),
    ):
        values = getattr(audio, name)
        if not values or min(values) < least:
            yield f"audio_tokenizer.{name} {values}: give one or more, each at least {least}"
        elif name.endswith("windows") and any(value % 32 for value in values):
            yield f"audio_tokenizer.{name} {values}: use multiples of 32"
    if not audio.adversarial_weight:
        for name in OF_DISCRIMINATORS:
            value = getattr(audio, name)
            if value != getattr(AudioTokenizerConfig(), name):
                yield (
                    f"audio_tokenizer.{name} {value} means nothing with "
                    "audio_tokenizer.adversarial_weight 0: drop it, or use a weight such as 1"
                )
    elif audio.adversarial_start >= config.train.steps:
        yield (
            f"audio_tokenizer.adversarial_start {audio.adversarial_start} >= train.steps "
            f"{config.train.steps}: the discriminators would never play: lower it"
        )
    if not data.audio_seconds * data.sample_rate >= 1:
        yield (
            f"data.audio_seconds {data.audio_seconds} at data.sample_rate {data.sample_rate} is "
            "less than a sample: raise it"
        )


def _below_minimum(config: Config) -> Iterator[str]:
    minimum = {
        "quantizer.codes": 2,
        "quantizer.width": 1,
        "quantizer.residual_levels": 1,
        "quantizer.restart": 0,
        "quantizer.decay": 0,
        "moe.experts": 1,
        "moe.top_k": 1,
        "moe.hidden": 1,
        "moe.shared_experts": 0,
        "moe.capacity_factor": 0,
        "moe.map_rank": 1,
        "moe.self_selecting_rank": 1,
        "moe.router_codebook_weight": 0,
        "moe.router_commitment_weight": 0,
        "moe.bias_update_rate": 0,
        "moe.expert_parallel": 1,
        "moe.z_loss_weight": 0,
        "moe.balance_weight": 0,
        "language_model.layers": 1,
        "language_model.heads": 1,
        "language_model.width": 2,
        "language_model.moe_every": 0,
        "image_tokenizer.hidden": 1,
        "image_tokenizer.downsamplings": 0,
        "image_tokenizer.residual_blocks": 0,
        "audio_tokenizer.hidden": 1,
        "audio_tokenizer.waveform_weight": 0,
        "audio_tokenizer.spectral_weight": 0,
        "audio_tokenizer.mel_weight": 0,
        "audio_tokenizer.adversarial_weight": 0,
        "audio_tokenizer.feature_weight": 0,
        "audio_tokenizer.adversarial_start": 0,
        "audio_tokenizer.discriminator_hidden": 1,
        "data.sample_rate": 1,
        "data.audio_seconds": 0,
        "data.image_size": 1,
        "data.crops": 1,
        "data.held_out_crops": 1,
        "data.context": 1,
        "data.vocabulary": 257,
        "train.steps": 1,
        "train.batch_size": 1,
        "train.accumulation": 1,
        "train.clip": 0,
        "train.log_every": 1,
        "train.eval_every": 1,
        "train.eval_batch_size": 1,
        "train.probe_tokens": 0,
        "train.save_every": 1,
        "train.keep_checkpoints": 1,
        "train.keep_every": 0,
        "optimizer.lr": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.map_lr_multiplier": 0,
        "optimizer.router_lr_multiplier": 0,
        "seed": 0,
        "data.seed": 0,
    }
    flat = flatten(config)
    for key, least in minimum.items():
        if not flat[key] >= least:
            yield f"{key} {flat[key]} < {least}: use at least {least}"
