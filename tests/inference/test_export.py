"""Runs exported to standard architectures of `transformers`: the same logits, text and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from simvq_moe.data.text.tokenizer import encode_text, end_of_text, load_tokenizer, train_tokenizer
from simvq_moe.inference.architectures import EPSILON
from simvq_moe.inference.fold import write_model
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.loading import load_model
from simvq_moe.tasks.registry import task_of

TEXT = ["to be or not to be, that is the question: whether 'tis nobler in the mind to suffer"] * 4
SMALL = (
    *("--task", "language_model", "--data.vocabulary", "280", "--data.context", "32"),
    *("--language_model.width", "32", "--language_model.layers", "2"),
    *("--language_model.heads", "2", "--moe.experts", "6", "--moe.top_k", "2"),
    *("--moe.hidden", "8", "--moe.expert.kind", "swiglu"),
)
MAPS = (
    *("--moe.router.map.kind", "linear", "--moe.router.map.base_width", "4"),
    *("--moe.expert_in_map.kind", "diagonal", "--moe.expert_out_map.kind", "linear"),
)
BIASES = ("--moe.balance.kind", "loss_free")
SHARED = ("--moe.shared_experts", "1")
EVERY = ("--language_model.moe_every", "2")
UNTIED = ("--language_model.tied_head", "False")
NORMALIZED = ("--language_model.qk_norm", "True")
SIGMOID, OPEN = ("--moe.gates", "sigmoid"), ("--moe.gates", "softmax_topk")
HELD: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("LlamaForCausalLM", ("--language_model.moe_every", "0", *UNTIED)),
    "softmax over the chosen, maps": ("MixtralForCausalLM", (*MAPS, *UNTIED)),
    "noise in training": ("MixtralForCausalLM", ("--moe.router.kind", "noisy_topk")),
    "biases": ("Ernie4_5_MoeForCausalLM", (*BIASES, *MAPS)),
    "quantile biases, shared": (
        "Ernie4_5_MoeForCausalLM",
        ("--moe.balance.kind", "quantile", *SHARED, *UNTIED),
    ),
    "some dense": ("Ernie4_5_MoeForCausalLM", EVERY),
    "softmax over all": ("Qwen2MoeForCausalLM", (*OPEN, *MAPS)),
    "softmax over all, shared, some dense": ("Qwen2MoeForCausalLM", (*OPEN, *SHARED, *EVERY)),
    "sigmoid": ("Glm4MoeForCausalLM", (*SIGMOID, *MAPS)),
    "sigmoid, biases, shared, first dense": (
        "Glm4MoeForCausalLM",
        (*SIGMOID, *BIASES, *SHARED, *EVERY, *UNTIED),
    ),
    "normalized queries, dense": (
        "Qwen3ForCausalLM",
        ("--language_model.moe_every", "0", *NORMALIZED),
    ),
    "normalized queries, maps": ("Qwen3MoeForCausalLM", (*NORMALIZED, *MAPS, *UNTIED)),
    "normalized queries, softmax over all, some dense": (
        "Qwen3MoeForCausalLM",
        (*NORMALIZED, *OPEN, *EVERY),
    ),
    "normalized queries, sigmoid, biases, shared": (
        "Glm4MoeForCausalLM",
        (*NORMALIZED, *SIGMOID, *BIASES, *SHARED),
    ),
    "inside documents": ("MixtralForCausalLM", ("--data.document_mask", "True")),
}


def run_of(folder: Path, *flags: str) -> Path:
    """A run's folder with random weights: maps are no identity, gains no ones, biases no zeros."""
    config = with_flags(Config(), (*SMALL, *flags), "train")
    model = task_of(config).build_model(config)
    if not isinstance(model, LanguageModel):
        return written(folder, config, model)
    random = torch.Generator().manual_seed(0)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random)
            tensor += noise * (0.02 if name.endswith("selection.bias") else 0.2)
    tokenizer = train_tokenizer([TEXT], config.data.vocabulary)
    if model.end_of_text is not None:
        model.end_of_text.fill_(end_of_text(tokenizer))
    return written(folder, config, model, {"tokenizer.json": tokenizer.to_str().encode()})


def written(
    folder: Path, config: Config, model: nn.Module, files: dict[str, bytes] | None = None
) -> Path:
    folder.mkdir(parents=True)
    write_model(folder, config, model.state_dict(), files or {})
    return folder


def exported(tmp_path: Path, *flags: str) -> tuple[Path, Path]:
    run, out = run_of(tmp_path / "run", *flags), tmp_path / "hf"
    assert main(["export", str(run), "--to", "hf", "--out", str(out)]) == 0
    return run, out


def exact(model: Any) -> Any:
    """In float64, also norms, which `transformers` computes in float32 whatever comes in."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            plain = nn.RMSNorm(len(module.weight), eps=EPSILON)
            plain.weight = module.weight
            module.forward = plain.double().forward
    model.config._experts_implementation = "eager"  # the others take no float64
    return model.double()


# where an architecture has shared experts and the model has none
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kind", HELD)
def test_logits_text_and_names_are_those_of_the_architecture(kind: str, tmp_path: Path) -> None:
    name, flags = HELD[kind]
    run, out = exported(tmp_path, *flags)
    config, ours = load_model(run)
    assert isinstance(ours, LanguageModel)
    theirs: Any = AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs).__name__ == name
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    own = load_tokenizer(str(run / "tokenizer.json"), config.data.vocabulary)
    text = "that is the question,  nobler\n\tto be"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == encode_text(own, text)
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert_close(theirs(ids).logits, ours.logits(ids)[0], rtol=1e-4, atol=1e-4)
    end = theirs.generation_config.eos_token_id
    assert end == end_of_text(own) == tokenizer.eos_token_id
    continued = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = ours.generate(ids, 8, temperature=0.0)
    before_end = (expected[0] == end).cumsum(0) == 0  # of one document
    assert_close(continued[0][before_end], expected[0][before_end])
    # the names of a checkpoint of its own
    theirs.save_pretrained(tmp_path / "again")
    again, files = (
        load_file(tmp_path / "again" / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert files.keys() == again.keys()
    for key, tensor in again.items():
        assert_close(files[key], tensor, rtol=0, atol=0)
    for module in ours.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = EPSILON
    with torch.no_grad():
        before, after = ours.double().logits(ids)[0], exact(theirs)(ids).logits
    assert_close(after, before, rtol=2e-6, atol=2e-6)  # gates and angles are float32 there


REFUSED = {
    "moe.expert.kind 'gelu'": ("--moe.expert.kind", "gelu"),
    "moe.router.kind 'cosine'": ("--moe.router.kind", "cosine"),
    "adds biases": ("--moe.router.whiten.kind", "full"),
    "takes off a mean": ("--moe.router.centre", "True"),
    "moe.router.bias": ("--moe.router.bias", "True"),
    "moe.capacity_factor 1.5": ("--moe.capacity_factor", "1.5"),
    "moe.expert_out_bias": ("--moe.expert_out_bias", "True"),
    "language_model.qk_norm True": (*NORMALIZED, *SHARED),
    "'softmax_topk' with moe.balance.kind 'loss_free'": (*OPEN, *BIASES),
    "moe_every 2": (*SIGMOID, *EVERY, "--language_model.layers", "4"),
    "task 'image_tokenizer'": ("--task", "image_tokenizer", "--quantizer.codes", "32"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_architecture_holds_is_refused_with_the_option_that_would(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of(tmp_path / "run", *REFUSED[words]), tmp_path / "hf"
    assert main(["export", str(run), "--to", "hf", "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "or use --to safetensors" in told
    assert not out.exists()
    # which takes any model
    assert main(["export", str(run), "--to", "safetensors", "--out", str(out)]) == 0


def test_one_file_says_what_it_is_and_holds_the_folded_weights(tmp_path: Path) -> None:
    run, out = run_of(tmp_path / "run", *MAPS), tmp_path / "out"
    assert main(["export", str(run), "--to", "safetensors", "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    with safe_open(out / "model.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["tokenizer.json"] == (run / "tokenizer.json").read_text()
    (tmp_path / "config.yaml").write_text(notes["config.yaml"])
    config = merge_files(Config, [tmp_path / "config.yaml"])
    model = task_of(config).build_model(config)
    model.load_state_dict(load_file(out / "model.safetensors"))
    assert isinstance(model, LanguageModel)
    tokens = torch.arange(20)[None]
    _, ours = load_model(run)
    assert isinstance(ours, LanguageModel)
    assert_close(model.eval().logits(tokens)[0], ours.logits(tokens)[0], rtol=1e-4, atol=1e-4)


def test_a_folder_in_use_is_left_as_it_was_and_an_unfinished_one_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = exported(tmp_path)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    command = ["export", str(run), "--to", "hf", "--out", str(out)]
    assert main(command) == 2
    assert f"--out {out} is not empty" in capsys.readouterr().err
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    # as a kill leaves it
    made_of = tmp_path / "other"
    assert main([*command[:-1], str(made_of)]) == 0
    (out / "config.json").unlink()
    (out / "unfinished.json").write_text("{}")
    assert main(command) == 2
    assert "was being filled by another command" in capsys.readouterr().err


def test_a_model_that_has_diverged_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    config, _ = load_model(run)
    write_model(run, config, weights, {})
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "the run has diverged" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_config_names_the_base_of_rotations_where_older_readers_look(tmp_path: Path) -> None:
    _, out = exported(tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["architectures"] == ["MixtralForCausalLM"]
