"""A checkpoint of SimVQ's authors becomes a run that the commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simvq_moe.cli import main
from simvq_moe.config.checks import check
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.data.codes import open_codes
from simvq_moe.errors import ConfigError
from simvq_moe.inference.official_checkpoint import write_run
from simvq_moe.models.image.official_layout import image_tokenizer_from
from simvq_moe.tasks.registry import build_task
from tests.data.test_images import image_folder
from tests.models.test_official_layout import official_state


def test_an_official_checkpoint_is_a_run_to_evaluate_encode_and_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, file = official_state(), tmp_path / "theirs.ckpt"
    torch.save({"state_dict": state, "epoch": 49}, file)
    run = tmp_path / "runs" / "official"
    pictures = image_folder(tmp_path / "pictures")
    data = DataConfig(
        source=str(pictures), image_size=16, shorter_side=16, crops=6, held_out_crops=6
    )
    written = write_run(file, run, data, averages=False)
    config = merge_files(Config, [run / "config.yaml"])
    assert config == written
    check(config)
    assert main(["eval", str(run)]) == 0
    measures = json.loads(capsys.readouterr().out)
    assert main(["encode", str(run), "--out", str(tmp_path / "codes"), "--crops"]) == 0
    assert main(["decode", str(tmp_path / "codes"), "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").rglob("*.png"))) == 12
    # the reference computes in float64, the run in float32
    tokenizer = image_tokenizer_from(state)
    images = build_task(config).held_out.batch(np.arange(6))
    with torch.no_grad():
        reconstruction, quantized = tokenizer.reconstruct(images.double())
    rows = open_codes(tmp_path / "codes")["held_out"].rows(np.arange(6))
    np.testing.assert_array_equal(rows, quantized.ids.flatten(1).numpy())
    # measured as it is seen
    error = (reconstruction.clamp(-1, 1) - images).square().mean()
    assert measures["val/mse"] == pytest.approx(float(error), rel=1e-4)


def garbage() -> list[Any]:
    """What a download that failed, a stranger or another program may have left."""
    state = official_state()
    name = "encoder.conv_in.weight"
    large = torch.ones(1).expand(10**6, 3, 3, 3)  # a view of one number
    wrong = (torch.ones(()), torch.ones(0, 3, 3, 3), torch.ones(4, 3, 3, 3).int(), large, "text")
    return [
        *(b"", b"<html>not found</html>", b"\x80\x02ca\nb\n.", b"PK\x03\x04" + bytes(40)),
        *([], {}, {"state_dict": None}, {"state_dict": [1]}, {"state_dict": {1: torch.ones(1)}}),
        {"state_dict": {"weight": torch.ones(1)}, "made": Path("x")},
        *({"state_dict": state | {name: tensor}} for tensor in wrong),
        {"state_dict": state | {"quantize.embedding.weight": torch.ones(4)}},
        {"state_dict": {n: w for n, w in state.items() if n != "quantize.embedding_proj.weight"}},
        {"state_dict": {n: w for n, w in state.items() if "decoder" not in n}},
    ]


def test_other_files_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(1)}}, other)
    for file in (other, tmp_path / "nowhere.ckpt"):
        with pytest.raises(ConfigError, match="is no checkpoint of SimVQ's authors"):
            write_run(file, tmp_path / "out", DataConfig())
    for content in garbage():
        if isinstance(content, bytes):
            other.write_bytes(content)
        else:
            torch.save(content, other)
        with pytest.raises(ConfigError, match="is no checkpoint of SimVQ's authors") as error:
            write_run(other, tmp_path / "out", DataConfig())
        # torch's advice for such files is to run what they say
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "out").exists()
    torch.save({"state_dict": official_state()}, other)
    with pytest.raises(ConfigError, match=r"no model_ema\.\*: use averages=False"):
        write_run(other, tmp_path / "out", DataConfig())
    with pytest.raises(ConfigError, match="is not empty"):
        write_run(other, tmp_path, DataConfig())
