"""Finished runs as models: loaded from their checkpoint, evaluated, folded, and asked for text.

Folding merges every shared map into the rows that it maps (`Bank.fold`), so that the model of a
config without maps computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simvq_moe.config.flags import check_least
from simvq_moe.config.loading import ConfigError, to_yaml
from simvq_moe.config.schema import Config, MoEConfig, QuantizerConfig
from simvq_moe.core.bank import Bank
from simvq_moe.core.whitening import Whitening
from simvq_moe.data.tokenizer import encode_text, end_of_text, load_tokenizer
from simvq_moe.engine.devices import this_device
from simvq_moe.engine.world import World
from simvq_moe.files.regular import read_bytes, write_atomically, written_whole
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.models.audio_tokenizer import AudioTokenizer
from simvq_moe.models.image_tokenizer import ImageTokenizer
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.runs.loading import (
    FOLDED,
    fill,
    load_model,
    load_run,
    weights_sha256,
    with_cache,
    without_networks,
)
from simvq_moe.tasks.build import TOKENIZER, build_task, check_source
from simvq_moe.tasks.codes import Drawing, check_same_codes
from simvq_moe.tasks.image_measures import optional_measures
from simvq_moe.tasks.models import AnyModel, build_model
from simvq_moe.training.evaluation import evaluate

LARGEST_DIFFERENCE = 1e-9
"""Between outputs before and after folding, in float64, relative to the largest output."""


def evaluate_run(
    run_dir: Path,
    source: str | None,
    *,
    lpips: bool = False,
    rfid: bool = False,
    cache_dir: Path | None = None,
) -> dict[str, float]:
    """Measures of the run's model over its held-out set, or over that of another source.

    Args:
        lpips, rfid: of image tokenizers, also these measures, which need networks.
        cache_dir: folder of what is derived from text; None: the usual one, below the working
            directory. The config of a run does not say where its readers write.
    """
    config, weights = load_run(run_dir)
    if source is not None:
        check_same_codes(config, source)
        config = replace(config, data=replace(config.data, source=source, held_out_source=None))
    if (lpips or rfid) and config.task != "image_tokenizer":
        raise ConfigError(f"--{'lpips' if lpips else 'rfid'}: task {config.task!r} has no images")
    measures = optional_measures(config.image_tokenizer, lpips=lpips, rfid=rfid)
    config = with_cache(without_networks(config), cache_dir)
    check_source(config)
    tokenizer = _own_tokenizer(run_dir, config)
    task = build_task(config, tokenizer, measures)
    fill(task.model, weights)
    device = this_device()
    task.model.to(device)
    return evaluate(task, World(0, 1, device), config.train.eval_batch_size)[0]


def _own_tokenizer(run_dir: Path, config: Config) -> Path | None:
    """The run's copy of its text tokenizer; None: it has none, or trained it on its source.

    Raises:
        ConfigError: the copy is gone, and the config names another file or one of the hub.
    """
    if (run_dir / TOKENIZER).is_file():
        return run_dir / TOKENIZER
    if config.data.tokenizer is not None:
        raise ConfigError(
            f"{run_dir} has no {TOKENIZER}, its copy of data.tokenizer {config.data.tokenizer!r}: "
            "put it there"
        )
    return None


def generate_text(
    run_dir: Path, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """The prompt, as the beginning of a document, and a continuation of so many tokens.

    The prompt is encoded as documents are for training: a special token that it quotes is text, and
    nothing is put before or behind it.

    Raises:
        ConfigError: it is no run of a language model, a number is out of its range, or the prompt
            is no text.
    """
    check_least(tokens=(tokens, 1))
    drawing = Drawing(temperature, top_k, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt {prompt!r} is no UTF-8: give text in that encoding") from None
    config, model = load_model(run_dir)
    if not isinstance(model, LanguageModel) or not (run_dir / TOKENIZER).is_file():
        raise ConfigError(
            f"{run_dir} is a run of task {config.task!r} without a {TOKENIZER}: give the folder of "
            "a language model's run, and --out for one on codes"
        )
    tokenizer = load_tokenizer(str(run_dir / TOKENIZER), config.data.vocabulary)
    beginning = torch.tensor([[end_of_text(tokenizer), *encode_text(tokenizer, prompt)]])
    with drawing.of_finite_scores(run_dir):
        whole = model.generate(beginning, tokens, **drawing.options())
    return tokenizer.decode(whole[0].tolist())


def fold_run(run_dir: Path, out: Path, *, merge_norms: bool = False) -> float:
    """Write model.safetensors and config.yaml of the same model without maps.

    Returns the largest difference between the outputs of both in float64, relative to the largest
    output; nothing is written unless it is rounding. Killed at any moment, the same call goes on.

    Args:
        merge_norms: also merge the gains of norms, see `LanguageModel.merge_norms_`.

    Raises:
        ConfigError: the run has nothing to fold, or something that can't be.
    """
    check_free(out)
    config, weights = load_run(run_dir)
    model = fill(build_model(without_networks(config)), weights).eval()
    mapped = any(
        (isinstance(module, Bank) and module.maps) or isinstance(module, Whitening)
        for module in model.modules()
    )
    if not (mapped or merge_norms):
        norms = " but norms: --merge_norms" if config.task == "language_model" else ""
        raise ConfigError(f"{run_dir} has no shared map: there is nothing to fold{norms}")
    folded_config = without_maps(config)
    folded = build_model(without_networks(folded_config)).double().eval()
    folded.load_state_dict(fold_weights(model.double()))
    if merge_norms:
        _merge_norms(folded)
    difference = _difference(model, folded, config)
    if not difference <= LARGEST_DIFFERENCE:
        raise ConfigError(
            f"folding {run_dir} changes its outputs by {difference:.2g} of the largest, or they "
            "are not finite: the run has diverged, use another checkpoint or train again"
        )
    tokenizer = None
    if (run_dir / TOKENIZER).is_file():
        # read as a tokenizer first: a copy must not publish another file that a link leads to
        load_tokenizer(str(run_dir / TOKENIZER), config.data.vocabulary)
        tokenizer = read_bytes(run_dir / TOKENIZER)
    made_of = {"weights": weights_sha256(weights), "merge_norms": merge_norms}
    with filling(out, "fold", made_of):
        write_model(out, folded_config, folded.float().state_dict(), tokenizer)
    return difference


def write_model(
    out: Path, config: Config, weights: Mapping[str, Tensor], tokenizer: bytes | None = None
) -> None:
    """A folder that is taken for a run: config.yaml comes last, and with it the folder is one."""
    with written_whole(out / FOLDED) as aside:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside)
    if tokenizer is not None:
        write_atomically(out / TOKENIZER, tokenizer)
    write_atomically(out / "config.yaml", to_yaml(config))


def without_maps(config: Config) -> Config:
    """The config of the folded model.

    Raises:
        ConfigError: the quantizer's rows are no single linear map of their base.
    """
    q, moe = config.quantizer, config.moe
    if config.task != "language_model":
        if q.kind != "simvq":
            raise ConfigError(f"quantizer.kind {q.kind!r} has no shared map: only simvq folds")
        shared = ("codes", "width", "residual_levels", "gradient")
        kept = {
            name: getattr(q, name) for name in (*shared, "codebook_weight", "commitment_weight")
        }
        q = replace(QuantizerConfig(kind="vq"), **kept)
    moe = replace(moe, router_map="none", expert_out_map="none", expert_in_map="none")
    moe = replace(moe, router_base_width=None, train_router_base=True, router_init="default")
    if moe.whiten_router_input != "none":
        options = ("exponent", "decay", "floor", "every", "rank")
        defaults = {
            f"whitening_{name}": getattr(MoEConfig(), f"whitening_{name}") for name in options
        }
        moe = replace(moe, whiten_router_input="none", router_bias=True, **defaults)
    return replace(config, quantizer=q, moe=moe)


def fold_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with every bank, and every whitening, folded."""
    weights = dict(model.state_dict())
    layers = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    for name, module in model.named_modules():
        in_layer = any(name.startswith(f"{layer}.") for layer in layers)  # which folds as a whole
        if isinstance(module, Bank | MoE) and not in_layer:
            for key in [key for key in weights if key.startswith(f"{name}.")]:
                del weights[key]
            weights |= {f"{name}.{k}": v for k, v in module.fold().state_dict().items()}
    return {name: tensor for name, tensor in weights.items() if not name.endswith("initialized")}


def _merge_norms(model: AnyModel) -> None:
    if not isinstance(model, LanguageModel):
        raise ConfigError("--merge_norms: a tokenizer has no norms: drop it")
    try:
        model.merge_norms_()
    except ValueError as error:
        raise ConfigError(f"--merge_norms: {error}: drop it") from None


@torch.no_grad()
def _difference(model: AnyModel, folded: AnyModel, config: Config) -> float:
    torch.manual_seed(0)
    if isinstance(model, LanguageModel) and isinstance(folded, LanguageModel):
        tokens = torch.randint(config.data.vocabulary, (8, config.data.context))
        before, after = model.logits(tokens)[0], folded.logits(tokens)[0]
    elif isinstance(model, AudioTokenizer) and isinstance(folded, AudioTokenizer):
        audio = torch.rand(8, 16 * model.hop) * 2 - 1
        before, after = model.reconstruct(audio)[0], folded.reconstruct(audio)[0]
    else:
        assert isinstance(model, ImageTokenizer)
        assert isinstance(folded, ImageTokenizer)
        images = torch.rand(8, 3, config.data.image_size, config.data.image_size) * 2 - 1
        before, after = model.reconstruct(images)[0], folded.reconstruct(images)[0]
    return float((after - before).abs().max() / before.abs().max())
