"""Made-up sweeps with known effects: run directories as training writes them, without training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simvq_moe.core.usage import usage
from simvq_moe.records.catalogue import router_leaves

STEPS = range(100, 801, 100)
HELD_OUT_TOKENS = 65_664


@dataclass(frozen=True)
class FakeArm:
    """An arm whose held-out error and evenness are set rather than trained."""

    name: str
    label: str
    error: float
    """Mean held-out error."""
    evenness: float
    """Dirichlet concentration of its slot probabilities: small is collapsed."""
    has_map: bool = False
    control: bool = False


CODES_ARMS = (
    FakeArm("vq", "VQ", 3.05e-3, 0.02),
    FakeArm("ema", "EMA-VQ", 2.71e-3, 0.05),
    FakeArm("simvq", "SimVQ", 2.1e-3, 0.9, has_map=True),
    FakeArm("vq-width-4", "VQ, width 4", 1.97e-3, 0.4, control=True),
)
EXPERTS_ARMS = (
    FakeArm("base", "base", 2.301, 0.3),
    FakeArm("aux", "aux loss", 2.295, 30.0),
    FakeArm(
        "expert-out",
        "shared map after the experts and a weak load-balance loss",
        2.303,
        0.3,
        has_map=True,
    ),
    FakeArm("router-qw", "router Q W, Q frozen", 2.305, 0.9, has_map=True),
    FakeArm("slow-router", "router lr x 0.1", 2.302, 1.5, control=True),
)


def write_sweep(
    directory: Path,
    *,
    seeds: int = 2,
    noise: float = 0.01,
    codes: tuple[FakeArm, ...] = CODES_ARMS,
    experts: tuple[FakeArm, ...] = EXPERTS_ARMS,
    primary: dict[str, str] | None = None,
) -> Path:
    """A sweep of a codes group and an experts group; `noise` is relative, over seeds; `primary`
    names tests of the codes."""
    groups = []
    for name, arms, outcomes in (
        ("codes", codes, ["val/mse", "val/codes/used"]),
        ("experts", experts, ["val/bits_per_byte"]),
    ):
        if not arms:
            continue
        groups.append(
            {
                "name": name,
                "question": f"Does one shared map make all {name} be used, at a lower error?",
                "config": f"configs/{name}.yaml",
                "baseline": arms[0].name,
                "outcomes": outcomes,
                "primary": (primary or {}) if name == "codes" else {},
                "notes": "Gates sum to 1 in every arm." if name == "experts" else "",
                "arms": [
                    {
                        "name": arm.name,
                        "label": arm.label,
                        "control": arm.control,
                        "overrides": {"quantizer.kind": arm.name},
                        "runs": [
                            {
                                "seed": seed,
                                "dir": f"{name}/{arm.name}/seed{seed}",
                                "status": "finished",
                            }
                            for seed in range(seeds)
                        ],
                    }
                    for arm in arms
                ],
            }
        )
        for arm in arms:
            for seed in range(seeds):
                run = directory / name / arm.name / f"seed{seed}"
                write_run(run, arm, seed, experts=name == "experts", noise=noise)
    content = {"name": "quickstart", "title": "A made-up sweep", "groups": groups}
    content["command"] = "simvq-moe sweep --config configs/sweeps/quickstart.yaml --ranks 2"
    (directory / "sweep.json").write_text(json.dumps(content))
    return directory


def write_run(
    path: Path, arm: FakeArm, seed: int, *, experts: bool = False, noise: float = 0.01
) -> None:
    """One finished run directory."""
    path.mkdir(parents=True)
    kind = "experts" if experts else "codes"
    slots, layers, top_k = (64, 3, 4) if experts else (512, 1, 1)
    rng = np.random.default_rng([seed, *arm.name.encode()])
    # half of the noise is that of the seed, which pairs share
    shared = np.random.default_rng([seed, experts]).normal()
    error = arm.error * (1 + noise * (shared + rng.normal()) / 2**0.5)
    counts = np.stack([_counts(rng, arm, slots, layers, top_k, step) for step in STEPS])
    lines = [_line(arm, kind, step, error, c) for step, c in zip(STEPS, counts, strict=True)]
    (path / "config.yaml").write_text(_config(arm, kind, seed))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez(path / "usage.npz", val_steps=np.array(STEPS), val_counts=counts)
    summary = {k: v for k, v in lines[-1].items() if k.startswith("val/")}
    summary |= {"step": 800, "val/tokens": HELD_OUT_TOKENS, "speed/tokens_per_s": 52_000.4}
    summary |= {"time/train_s": 19.5 + rng.normal(), "time/wall_s": 24.5 + rng.normal()}
    summary |= {"memory/peak_mib": 700 + rng.normal()}
    if experts:
        summary |= {f"val/moe/mean/saturation_at/{s}": s / 900 for s in list(STEPS)[:-1]}
        summary |= {
            f"val/moe/mean/{name}": float(rng.uniform()) for name in router_leaves("routers")
        }
        _write_probe(path / "probe.npz", rng, slots, layers, top_k)
    (path / "summary.json").write_text(json.dumps(summary))
    write_meta(path, arm, seed, kind=kind, slots=slots, layers=layers, top_k=top_k)
    if not experts:
        (path / "samples").mkdir()
        pixels = rng.integers(0, 256, (4, 20, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((640, 128), Image.Resampling.BICUBIC)
        image.save(path / "samples" / "val_000800.png")


def _write_probe(
    file: Path, rng: np.random.Generator, slots: int, layers: int, top_k: int, tokens: int = 256
) -> None:
    """Two evaluations of a router that chooses at random."""
    ids = rng.random((2, layers, tokens, slots)).argsort(-1)[..., :top_k].astype(np.int8)
    domains = rng.integers(0, 3, tokens)
    counts = np.zeros((2, layers, slots, 3), dtype=np.int64)
    step, layer, token, _ = np.indices(ids.shape)
    np.add.at(counts, (step, layer, ids, domains[token]), 1)
    names = np.array(["code", "prose", "(others)"])
    np.savez(file, ids=ids, domains=domains, domain_counts=counts, domain_names=names)


def write_meta(
    path: Path,
    arm: FakeArm,
    seed: int,
    *,
    kind: str = "codes",
    slots: int = 512,
    layers: int = 1,
    top_k: int = 1,
    **changes: Any,
) -> None:
    """meta.json, with any of its entries changed."""
    meta = {
        "status": "finished",
        "error": None,
        "command": f"simvq-moe train --config configs/{kind}.yaml --arm {arm.name} --seed {seed}",
        "commit": "6fe1375",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.0"},
        "device": "cpu",
        "world_size": 2,
        "task": "language_model" if kind == "experts" else "image_tokenizer",
        "arm": arm.name,
        "seed": seed,
        "layers": [{"kind": kind, "slots": slots, "top_k": top_k}] * layers,
        "parameters": {"total": 120_345, "trainable": 104_000},
        "banks": [
            f"blocks.{i}.moe.experts.down" if kind == "experts" else "quantizer.bank"
            for i in range(layers)
        ],
    }
    (path / "meta.json").write_text(json.dumps(meta | changes))


def _counts(
    rng: np.random.Generator, arm: FakeArm, slots: int, layers: int, top_k: int, step: int
) -> np.ndarray:
    """Held-out counts that drift from even to the arm's evenness."""
    late = step / STEPS[-1]
    shares = rng.dirichlet(np.full(slots, arm.evenness + (1 - late) ** 2), size=layers)
    return np.stack([rng.multinomial(HELD_OUT_TOKENS * top_k, share) for share in shares])


def _line(arm: FakeArm, kind: str, step: int, error: float, counts: np.ndarray) -> dict[str, float]:
    late = np.exp(-step / 200)
    line: dict[str, float] = {"step": step, "time": step / 40, "train/loss": error * (1 + 4 * late)}
    outcome = "val/bits_per_byte" if kind == "experts" else "val/mse"
    line |= {outcome: error * (1 + late - np.exp(-4)), "val/loss": error * (1.4 + late)}
    measured = [usage(row).as_dict() for row in counts]
    for i, measures in enumerate(measured):
        prefix = f"val/moe/{i:02d}/" if kind == "experts" else "val/codes/"
        line |= {prefix + name: value for name, value in measures.items()}
    if kind == "experts":
        for name in measured[0]:
            line[f"val/moe/mean/{name}"] = float(np.mean([m[name] for m in measured]))
    if arm.has_map:
        for i in range(len(counts)):
            line[f"bank/{i:02d}/effective_rank"] = 3 + 29 * late + i
            line[f"bank/{i:02d}/condition"] = float(np.exp(step / 100))
            line[f"bank/{i:02d}/identity_distance"] = 1 - late
            line[f"bank/{i:02d}/indirect_movement"] = 0.2 + 0.01 * i
    return line


def _config(arm: FakeArm, kind: str, seed: int) -> str:
    task = "language_model" if kind == "experts" else "image_tokenizer"
    section = "moe" if kind == "experts" else "quantizer"
    return (
        f"task: {task}\nname: {kind}/{arm.name}/seed{seed}\narm: {arm.name}\nseed: {seed}\n"
        f"runs_dir: runs\n{section}:\n  kind: {arm.name}\n  map: {str(arm.has_map).lower()}\n"
        "optimizer:\n  lr: 1e-3\n"
    )
