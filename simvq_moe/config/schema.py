"""The configuration: frozen dataclasses with their defaults; `checks` says what can run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from simvq_moe.config.moe import MoEConfig as MoEConfig
from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import (
    CHANNELS,
    Channels,
    Count,
    CountOr0,
    Decay,
    Range,
    Seed,
    Share,
    Weight,
)
from simvq_moe.config.registry import Options, default_of, family, register


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    source: str | None = None
    """A folder, or an embedded set: "photos" (images), "python-stdlib" (text), "spoken-characters"
    (audio); "asterisk": the prompts of Debian's package; None: the embedded set of the task.
    language_model: also a folder of token shards, such as `encode` writes."""
    cache_dir: str = ".cache"
    """Folder of what is derived from the source once: tokenizer and token files."""
    seed: Seed = 0
    """Seed of the crops: the data set stays the same when the run's seed changes."""
    held_out_source: str | None = None
    """What held-out images, recordings or documents are of, which are not trained on even where
    source holds them too; None: the held-out split of a source that `datasets` has saved with
    splits, else a part of source that training never sees."""
    image_size: Annotated[int, Range(1, 2**14)] = 32
    """Pixels a side of a crop."""
    shorter_side: Annotated[int, Range(0, 2**16)] = 0
    """Pixels that the shorter side of an image is resized to before it is cropped; 0: as it is."""
    decoded_megabytes: CountOr0 = 4_096
    """Memory for crops of images or audio; a larger set is read batch by batch, as much of it
    kept."""
    crops: Count = 18_000
    """Training crops."""
    held_out_crops: Count = 1_026
    """Held-out crops, from parts of images or recordings that training never sees."""
    sample_rate: Annotated[int, Range(1, 10**6)] = 16_000
    """Hz of audio; recordings of another rate are resampled."""
    audio_seconds: Annotated[float, Range(0, 3600)] = 0.2
    """Length of an audio crop; shorter recordings are left out."""
    text_field: str = "text"
    """language_model: column of parquet and Arrow files, or field of JSON, that holds the text."""
    vocabulary: Annotated[int, Range(2, 2**24)] = 1_024
    """Tokens of the byte-level BPE vocabulary, trained on the training documents; 257: the bytes
    and the end of text alone."""
    tokenizer: str | None = None
    """A byte-level tokenizer in place of one trained here: a tokenizer.json, a folder with one, or
    a name on the Hugging Face hub; vocabulary is then at least its size."""
    context: Annotated[int, Range(1, 2**24)] = 128
    """Tokens a sequence."""
    document_mask: bool = False
    """language_model: attention stays inside a document, and positions restart at each."""
    streaming: bool = False
    """language_model: read and encode documents while training, without an encoded copy; also
    data sets of the Hugging Face hub, by NAME or NAME:CONFIG."""
    sources: tuple[str, ...] = ()
    """streaming: several sources in place of one."""
    source_weights: tuple[Weight, ...] = ()
    """Shares of the sources in the documents drawn, of any sum; (): equal."""
    held_out_share: Share = 0.1
    """streaming: share of all documents that training never sees, by the hash of their content."""
    held_out_documents: Count = 1_000
    """streaming: so many of these, the first found, are the held-out set."""
    shuffle_buffer: Count = 256
    """streaming: documents that are shuffled together, for each sample of a batch."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """A broken file or row of text: end the run with its name, or leave it out, named in the log.
    """
    prefetch: Annotated[int, Range(0, 1000)] = 2
    """Steps whose batches are read ahead in the background; 0: none."""


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Convolutional encoder and decoder around the quantizer, and their losses."""

    architecture: Literal["small", "vqgan"] = "small"
    """small: residual blocks at the lowest resolution; vqgan: at every one, with GroupNorm."""
    hidden: Annotated[int, Range(1, 2**14)] = 32
    """Channels of the convolutions, at the full resolution."""
    downsamplings: Annotated[int, Range(0, 14)] = 2
    """Stride-2 convolutions: a token covers 2^downsamplings pixels a side."""
    residual_blocks: Annotated[int, Range(0, 100)] = 1
    """Residual blocks at the lowest resolution, in the encoder and in the decoder; vqgan: at every
    resolution, and once more at the lowest."""
    channel_multipliers: tuple[Annotated[int, Range(0, 2**10)], ...] = ()
    """vqgan: factors on hidden at each resolution, one more than downsamplings; empty: all 1."""
    attention: bool = False
    """vqgan: an attention layer at the lowest resolution, in the encoder and in the decoder."""
    mse_weight: Weight = 1.0
    """Weight of the mean squared error of pixels in [-1, 1]."""
    l1_weight: Weight = 0.0
    """Weight of the mean absolute error."""
    ssim_weight: Weight = 0.0
    """Weight of 1 - SSIM."""
    lpips_weight: Weight = 0.0
    """Weight of LPIPS, the distance of a VGG16's activations."""
    lpips_file: str | None = None
    """torchvision's weights of VGG16, vgg16-397923af.pth; None: where torch.hub keeps them."""
    adversarial_weight: Weight = 0.0
    """Weight of the discriminator's verdict; 0: there is none."""
    adversarial_weighting: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: times the ratio of gradients at the decoder's last layer (arXiv:2012.09841, eq. 7).
    """
    adversarial_start: CountOr0 = 0
    """Steps before which the discriminator neither judges nor learns."""
    generator_loss: Literal["hinge", "non_saturating"] = "hinge"
    """What a verdict costs the reconstructions: -D(x'), or softplus(-D(x')) of an image's mean."""
    discriminator_hidden: Annotated[int, Range(1, 2**12)] = 64
    """Channels of its first layer."""
    discriminator_layers: Annotated[int, Range(1, 12)] = 3
    """Its layers of stride 2; with 3 it judges patches of 70 pixels a side."""
    lecam_weight: Weight = 0.0
    """Weight of the LeCam term in its loss, which holds it back where images are few (0.001 to 0.3:
    arXiv:2104.03310); 0: there is none."""


@dataclass(frozen=True)
class AudioTokenizerConfig:
    """Convolutional encoder and decoder of waveforms around the quantizer, and their losses."""

    hidden: Annotated[int, Range(1, 2**12)] = 32
    """Channels of the first convolution; every stride doubles them."""
    strides: tuple[Annotated[int, Range(2, 2**10)], ...] = (2, 4, 5, 8)
    """Strides of the convolutions; a token covers their product in samples."""
    dilations: tuple[Annotated[int, Range(1, 2**12)], ...] = (1, 3, 9)
    """Dilations of the residual units around every strided convolution and its mirror image."""
    loss_windows: tuple[Annotated[int, Range(32, 2**20)], ...] = (32, 64, 128, 256, 512, 1024, 2048)
    """Samples of a frame of the spectrograms in the loss."""
    waveform_weight: Weight = 1.0
    """Weight of the mean absolute error of samples."""
    spectral_weight: Weight = 1.0
    """Weight of the distance of magnitudes and their logarithms."""
    mel_weight: Weight = 1.0
    """Weight of the distance of log10 mel bands."""
    mel_bands: tuple[Annotated[int, Range(1, 2**12)], ...] = ()
    """Mel bands of each loss window; (): 5 for 32 samples to 320 for 2,048."""
    mel_scale: Literal["slaney", "htk"] = "slaney"
    """Linear to 1 kHz and logarithmic from there, or 2595 log10(1 + f / 700)."""
    mel_floor: Annotated[float, Range(1e-20, 1)] = 1e-5
    """Magnitude of a mel band below which there is silence, in mel_units."""
    mel_units: Literal["amplitude", "sum", "area"] = "amplitude"
    """amplitude: a sine of amplitude 1 has 1/2; sum: as torch.stft gives them, torchaudio's
    default; area: likewise, bands over half their width in Hz."""
    adversarial_weight: Weight = 0.0
    """Weight of the discriminators' verdict; 0: there are none."""
    feature_weight: Weight = 2.0
    """Weight of the distance of their activations."""
    adversarial_start: CountOr0 = 0
    """Steps before which discriminators neither judge nor learn."""
    discriminator_hidden: Annotated[int, Range(1, 2**12)] = 32
    """Channels of their first layers."""
    discriminator_periods: tuple[Annotated[int, Range(2, 2**12)], ...] = (2, 3, 5, 7, 11)
    """Samples; one discriminator of the waveform each."""
    discriminator_windows: tuple[Annotated[int, Range(32, 2**20)], ...] = (512, 1024, 2048)
    """Samples of a frame; one discriminator of the spectrum each."""
    discriminator_bands: tuple[Share, ...] = ()
    """Borders of frequency bands with layers of their own, as shares of half the sample rate; ():
    the spectrum is one band."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """Decoder-only transformer whose feed-forward layers are mixtures of experts, all or some."""

    width: Annotated[int, Range(2, CHANNELS)] = 64
    """Channels of the residual stream."""
    layers: Annotated[int, Range(1, 1000)] = 3
    """Transformer blocks."""
    heads: Channels = 4
    """Attention heads."""
    moe_every: Annotated[int, Range(0, 1000)] = 1
    """The last of every so many blocks has a mixture, the others one network as wide as the experts
    that a token meets, so that they cost as much; 0: all blocks are dense, the baseline."""
    tied_head: bool = True
    """The embedding is also the matrix of the head; otherwise it has its own."""
    qk_norm: bool = False
    """RMSNorm of each query and key over its channels, as in Qwen3: attention whose scores cannot
    grow without bound, for two norms more in each block."""
    depth_scaled: bool = True
    """Matrices that end a branch start smaller than others, by the root of twice the layers, as in
    GPT-2; False: they start like the others."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, Range(0, 1e38)] = 1e-3
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of the first and second moment."""
    weight_decay: Weight = 0.0
    """Decoupled decay of matrices; vectors and shared maps have none."""
    warmup_steps: CountOr0 = 50
    """Steps of linear warm-up."""
    final_lr_ratio: Weight = 1.0
    """Learning rate at the last step over the peak, reached by a cosine; 1: constant."""
    map_lr_multiplier: Weight = 1.0
    """Factor on the learning rate of every shared map W."""
    codebook_lr_multiplier: Weight = 1.0
    """Factor on the learning rate of all that codebooks learn: rows, maps (beside the factor above)
    and biases. Averages, running moments and grids have no rate."""
    router_lr_multiplier: Weight = 1.0
    """Factor on the learning rate of everything in routers but their maps."""
    router: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the matrices of routers but their maps: muon gives all directions of an update
    one length, with the root mean square of AdamW's, and needs train.zero_stage 0."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop and its engine."""

    steps: Count = 800
    """Optimizer steps."""
    batch_size: Count = 32
    """Samples of one optimizer step, over all ranks."""
    accumulation: Count = 1
    """Micro-batches of a rank and step."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward; the optimizer keeps fp32 weights. fp16 scales the loss and
    needs a GPU."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states over ranks, 2 gradients as well, 3
    parameters as well. One rank has nothing to shard: 1 and 2 run there as 0 where they can."""
    deepspeed_config: str | None = None
    """JSON file with further settings of DeepSpeed, such as offloading; those that follow from this
    config can't be in it."""
    clip: Weight = 0.0
    """Largest global norm of the gradient; 0: no clipping."""
    activation_checkpointing: bool = False
    """language_model: keep only the inputs of blocks for the backward pass, which runs them again:
    less memory, a third more arithmetic."""
    compile: bool = False
    """language_model: torch.compile what has sizes known beforehand, minutes at the first step:
    dense blocks, with bf16 mixtures as well, otherwise attention."""
    profile: bool = False
    """Trace three of the first six steps of rank 0 with torch.profiler, into the run's profile/."""
    peak_flops: Annotated[float, Range(0, 1e18)] | None = None
    """Floating-point operations a second of a device at best, for speed/mfu; None: NVIDIA's figure
    for a GPU that is known."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl; also the window of the usage counts."""
    eval_every: Count = 200
    """Steps between evaluations on the held-out set; the last step is always evaluated."""
    eval_batch_size: Count = 64
    """Held-out samples a rank evaluates at a time."""
    probe_tokens: Annotated[int, Range(0, 2**24)] = 8_192
    """Held-out tokens whose routing is followed over evaluations; 0: none. probe.npz keeps their
    choices: evaluations x layers x tokens x top_k bytes, or twice that, before compression."""
    save_every: Count = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 2
    """Latest checkpoints kept."""
    keep_every: CountOr0 = 0
    """Checkpoints at multiples of this step are kept for good; 0: none."""
    async_save: bool = False
    """Whether training goes on while a checkpoint is written: a step waits for a copy of the rank's
    part in host memory alone, of 12 bytes a parameter over the ranks that share it."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where the run is logged to beside its metrics.jsonl: tensorboard, wandb, mlflow, trackio, or
    a plug-in's; one that fails is named once and left alone."""
    tracker_project: str = "simvq_moe"
    """Project of the run in wandb and trackio, experiment in mlflow."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is NaN or infinite: end the run, or change nothing in that step,
    count it as train/skipped_steps and end the run after 10 in a row."""
    timeout_s: Annotated[float, Range(0, 10**7)] = 600.0
    """Seconds that a rank waits in one place before the run ends and names the rank behind; the
    first step, evaluations and checkpoints may take longer. 0: never."""


@family(package="simvq_moe.config.schema", default="none")
@dataclass(frozen=True)
class TaskOptions(Options):
    """Options of a plug-in's task; a kind of them has the task's name."""


@register
@dataclass(frozen=True)
class NoTaskOptions(TaskOptions):
    """Our own tasks have sections of the config."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class Config:
    """One training run."""

    task: str = "image_tokenizer"
    """What is trained: image_tokenizer, audio_tokenizer, language_model, or a plug-in's task."""
    name: str = "run"
    """The run's folder under runs_dir; the same name resumes."""
    arm: str | None = None
    """Name in comparisons; None: the run's name."""
    seed: Seed = 0
    """Seed of initial weights and data order."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    plugins: tuple[str, ...] = ()
    """Files that end with .py, or modules, that register components of the user's own; they are
    code, loaded before the rest of the config is read."""
    data: DataConfig = field(default_factory=DataConfig)
    quantizer: QuantizerOptions = field(default_factory=lambda: default_of(QuantizerOptions))
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    audio_tokenizer: AudioTokenizerConfig = field(default_factory=AudioTokenizerConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    task_options: TaskOptions = field(default_factory=NoTaskOptions)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def on_one_rank(config: Config) -> Config:
    """The same model for a process of its own."""
    return replace(config, moe=replace(config.moe, expert_parallel=1))
