"""Model cards of runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.inference.cards import card_of_run
from simvq_moe.inference.fold import fold_run
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.records.tensorboard import CELL, heat_map, loads
from simvq_moe.tasks.loading import load_model
from tests.short_training import train_two_steps

FLAGS = (
    *("--task", "language_model", "--moe.experts", "8", "--moe.expert_out_map.kind", "linear"),
    *("--data.vocabulary", "300", "--data.context", "16"),
)


def test_a_card_has_measures_usage_command_and_says_whether_maps_are_folded(
    tmp_path: Path, world: World
) -> None:
    summary = train_two_steps(with_flags(Config(), FLAGS, "train"), tmp_path / "runs", world)
    run = tmp_path / "runs" / "run"
    layers = [{"kind": "experts", "slots": 8, "top_k": 4}] * 3
    meta = {"command": "simvq-moe train --config mine.yaml", "commit": "abc", "layers": layers}
    (run / "meta.json").write_text(json.dumps(meta))
    (run / "summary.json").write_text(json.dumps(summary))
    card = card_of_run(run)
    text = str(card["README.md"])
    assert f"| val/bits_per_byte | {summary['val/bits_per_byte']:.4g} |" in text
    assert "simvq-moe train --config mine.yaml" in text
    assert "It has shared maps, which are not folded." in text
    assert "![](usage.png)" in text
    counts = np.load(run / "usage.npz")["counts"][-1]
    (tmp_path / "usage.png").write_bytes(bytes(card["usage.png"]))  # pyright: ignore[reportArgumentType]
    shown = np.asarray(Image.open(tmp_path / "usage.png"))
    np.testing.assert_array_equal(shown, heat_map(np.stack([loads(n) for n in counts]), CELL))
    _, model = load_model(run)
    assert isinstance(model, LanguageModel)
    model.save_pretrained(tmp_path / "saved", card=card)
    assert (tmp_path / "saved" / "usage.png").is_file()
    LanguageModel.from_pretrained(tmp_path / "saved")
    # a folded run has no records
    fold_run(run, tmp_path / "folded")
    plain = card_of_run(tmp_path / "folded")
    assert "It has no shared maps, or they are folded into its weights." in str(plain["README.md"])
    assert plain.keys() == {"README.md"}
