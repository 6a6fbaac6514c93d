"""From samples to token shards and back, and a language model on the codes between."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import merge_files, to_yaml
from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.schema import Config
from simvq_moe.data.codes import MANIFEST, open_codes, read_manifest
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.files.unfinished import filled_alone
from simvq_moe.models.audio.tokenizer import AudioTokenizer
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.codes import CodesTask, draw_sequences
from simvq_moe.tasks.decoder import Decoder
from simvq_moe.tasks.registry import build_model, build_task
from tests.launching import metrics, run_forked
from tests.short_training import train_flags, train_two_steps
from tests.two_ranks import TwoRanks

AUDIO = (
    *("--task", "audio_tokenizer", "--data.sample_rate", "8000", "--data.audio_seconds", "0.06"),
    *("--audio_tokenizer.hidden", "4", "--audio_tokenizer.strides", "5", "4"),
    *("--audio_tokenizer.dilations", "1", "--audio_tokenizer.loss_windows", "64"),
    *("--quantizer.codes", "16", "--optimizer.lr", "0.01"),
)
TOKENIZERS = {
    "image": ("--quantizer.codes", "32", "--optimizer.lr", "0.01", "--data.image_size", "16"),
    "residual": (
        *("--quantizer.codes", "16", "--quantizer.residual_levels", "2", "--data.image_size", "16"),
        *("--quantizer.width", "8"),
    ),
    "audio": AUDIO,
}
LANGUAGE = (
    *("--task", "language_model", "--moe.experts", "4", "--moe.top_k", "2", "--moe.hidden", "8"),
    *("--language_model.layers", "1", "--language_model.width", "16", "--train.probe_tokens", "64"),
    *("--train.batch_size", "4", "--optimizer.lr", "0.01"),
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, Path]:
    """Folders with the run of a tokenizer, runs/run, and its codes, codes."""
    folders = {}
    for kind, flags in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(kind)
        train_two_steps(with_flags(Config(), flags, "train"), folder / "runs", world)
        assert main(["encode", str(folder / "runs/run"), *to(folder / "codes")]) == 0
        folders[kind] = folder
    return folders


def to(folder: Path) -> list[str]:
    """Crops, as many as the run trains on."""
    return ["--out", str(folder), "--shard_samples", "24", "--crops"]


def trained(folder: Path) -> tuple[Config, ImageTokenizer | AudioTokenizer]:
    """The tokenizer as it was trained, by another way than the decoder's."""
    from simvq_moe.tasks.loading import load_run

    config, weights = load_run(folder / "runs/run")
    model = build_model(config)
    assert isinstance(model, ImageTokenizer | AudioTokenizer)
    model.load_state_dict(weights)
    return config, model.eval()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_decoded_codes_are_the_models_own_reconstruction_to_the_bit(
    kind: str, encoded: dict[str, Path]
) -> None:
    config, model = trained(encoded[kind])
    task = build_task(config)
    parts = open_codes(encoded[kind] / "codes")
    decoder = Decoder(encoded[kind] / "codes", torch.device("cpu"))
    samples = {"train": task.train, "held_out": task.held_out}
    for part, sequences in parts.items():
        assert len(sequences) == {"train": 64, "held_out": 18}[part]
        batch = samples[part].batch(np.arange(18))
        with torch.no_grad():
            expected, quantized = model.reconstruct(batch)
        rows = sequences.rows(np.arange(18))
        np.testing.assert_array_equal(rows, quantized.ids.reshape(rows.shape).numpy())
        assert_close(decoder.decode(sequences.batch(np.arange(18))), expected, rtol=0, atol=0)


def test_decode_writes_the_reconstructions_as_pictures(
    encoded: dict[str, Path], tmp_path: Path
) -> None:
    folder = encoded["image"]
    out = tmp_path / "out"
    assert main(["decode", str(folder / "codes"), "--out", str(out), "--limit", "3"]) == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert files == [f"{part}/{i:06d}.png" for part in ("held_out", "train") for i in range(3)]
    config, model = trained(folder)
    with torch.no_grad():
        expected = model.reconstruct(build_task(config).held_out.batch(np.arange(3)))[0]
    for i, image in enumerate(expected):
        with Image.open(out / f"held_out/{i:06d}.png") as picture:
            found = np.asarray(picture).astype(int)
        bytes_of = ((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).int().numpy()
        np.testing.assert_array_equal(found, bytes_of)
    assert main(["decode", str(folder / "codes"), "--out", str(out)]) == 2


def test_decode_writes_clips_of_the_length_that_was_encoded(
    encoded: dict[str, Path], tmp_path: Path
) -> None:
    folder = encoded["audio"]
    assert main(["decode", str(folder / "codes"), "--out", str(tmp_path / "out")]) == 0
    config, model = trained(folder)
    with torch.no_grad():
        expected = model.reconstruct(build_task(config).held_out.batch(np.arange(18)))[0]
    for i, clip in enumerate(expected.clamp(-1, 1)):
        found, rate = soundfile.read(tmp_path / f"out/held_out/{i:06d}.wav", dtype="float32")
        assert rate == 8000
        # 16 bits
        assert_close(torch.from_numpy(found), clip, rtol=0, atol=1.01 / 2**15)


def test_encoding_again_writes_nothing_but_what_is_missing_or_damaged(
    encoded: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = encoded["image"] / "runs/run"
    folder = encoded["image"] / "again"
    shutil.copytree(encoded["image"] / "codes", folder)
    files = sorted(path.name for path in folder.iterdir())
    assert files == [
        *("held_out_00000.npy", "manifest.json"),
        *(f"train_{i:05d}.npy" for i in range(3)),
    ]
    content = {name: (folder / name).read_bytes() for name in files}
    before = {name: (folder / name).stat().st_mtime_ns for name in files}
    shard = folder / "train_00001.npy"
    shard.write_bytes(content[shard.name][:-1] + b"?")
    (folder / "train_00002.npy").unlink()
    assert main(["encode", str(run_dir), *to(folder)]) == 0
    said = capsys.readouterr().err
    assert "train_00001.npy is damaged" in said
    assert "encode 40/40 samples  100%" in said
    assert {name: (folder / name).read_bytes() for name in files} == content
    kept = ("held_out_00000.npy", "train_00000.npy")
    assert all((folder / name).stat().st_mtime_ns == before[name] for name in kept)
    # as an interrupted run leaves it
    manifest = json.loads(content[MANIFEST])
    (folder / MANIFEST).write_text(json.dumps(manifest | {"shards": {}}))
    (folder / "train_00000.npy").unlink()
    assert main(["encode", str(run_dir), *to(folder)]) == 0
    assert "encode 24/24 samples" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in files} == content


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("encode runs/run --out codes --crops --shard_samples 5", "shard_samples was 24 and is"),
        ("encode runs/run --out runs", "--out runs holds something else than codes"),
        ("encode runs/run --out new --shard_samples 0", "--shard_samples 0 < 1"),
        ("encode runs/run --out new --data nowhere", "data.source 'nowhere' does not exist"),
        ("encode nowhere --out new", "nowhere holds no config.yaml"),
        ("decode runs --out new", "runs holds no manifest.json of token shards"),
        ("decode codes --out runs", "--out runs is not empty"),
        ("decode codes --out new --limit 0", "--limit 0 < 1"),
        ("generate runs/run --out new", "runs/run is no language model on codes"),
    ],
)
def test_what_can_not_be_encoded_or_decoded_is_refused(
    command: str,
    words: str,
    encoded: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(encoded["image"])
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not Path("new").exists()


def test_a_run_whose_path_a_manifest_could_not_say_is_not_encoded(
    encoded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(encoded["image"] / "runs/run", link)
    assert main(["encode", str(link), *to(tmp_path / "new")]) == 2
    assert "caf\\udce9' has characters that can't be printed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_another_process_encodes_into_is_refused(
    encoded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", str(encoded["image"] / "runs/run"), *to(tmp_path / "codes")]
    (tmp_path / "codes").mkdir()
    with filled_alone(tmp_path / "codes"):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "is being filled by another process" in error
        assert error.count("\n") == 1
    assert list((tmp_path / "codes").iterdir()) == []
    assert main(command) == 0


def test_another_source_is_encoded_by_the_same_tokenizer(
    encoded: dict[str, Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(20):
        noise = rng.integers(256, size=(20, 20, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{i:02d}.png")
    command = ["encode", str(encoded["image"] / "runs/run"), "--data", str(tmp_path / "images")]
    assert main([*command, *to(tmp_path / "codes")]) == 0
    manifest = read_manifest(tmp_path / "codes")
    own = read_manifest(encoded["image"] / "codes")
    assert manifest.source == str(tmp_path / "images")
    assert manifest.data_digest != own.data_digest
    assert manifest.tokenizer.weights_sha256 == own.tokenizer.weights_sha256


def test_another_source_is_encoded_alone_whatever_the_run_held_out(
    encoded: dict[str, Path], tmp_path: Path
) -> None:
    run, rng = tmp_path / "run", np.random.default_rng(0)
    shutil.copytree(encoded["image"] / "runs/run", run)
    for name, low, high in (("held_out", 0, 2), ("new", 253, 255)):
        (tmp_path / name).mkdir()
        for i in range(20):
            noise = rng.integers(low, high, size=(16, 16, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i:02d}.png")
    config = merge_files(Config, [run / "config.yaml"])
    config = with_flags(config, ["--data.held_out_source", str(tmp_path / "held_out")], "train")
    (run / "config.yaml").write_text(to_yaml(config))
    for options in (["--crops"], []):
        out = tmp_path / f"codes{len(options)}"
        command = ["encode", str(run), "--data", str(tmp_path / "new"), "--out", str(out)]
        assert main([*command, *options]) == 0
        decoded = tmp_path / f"decoded{len(options)}"
        assert main(["decode", str(out), "--out", str(decoded)]) == 0
        images = {}
        for part in ("train", "held_out"):
            codes = open_codes(out)[part]
            images[part] = codes.rows(np.arange(len(codes)))
        # all images are as white, so that their codes are about the same
        assert np.isin(images["held_out"], images["train"]).mean() > 0.9


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_whole_images_and_recordings_are_encoded_once_and_come_back_in_their_size(
    kind: str, encoded: dict[str, Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    sizes = {}
    for i in range(24):
        # four are smaller than a window, and 20 are enough to be split by file
        low, high = (5, 9) if i < 4 else (17, 40)
        height, width = (int(n) for n in rng.integers(low, high, size=2))
        if kind == "image":
            noise = rng.integers(256, size=(height, width, 3)).astype(np.uint8)
            Image.fromarray(noise).save(source / f"{i:02d}.png")
            sizes[f"{i:02d}.png"] = [height, width]
        else:
            soundfile.write(source / f"{i:02d}.wav", rng.uniform(-0.5, 0.5, 50 * width), 8000)
            sizes[f"{i:02d}.wav"] = [50 * width]
    out, decoded = tmp_path / "codes", tmp_path / "decoded"
    command = ["encode", str(encoded[kind] / "runs/run"), "--data", str(source)]
    assert main([*command, "--out", str(out), "--shard_samples", "24"]) == 0
    items = json.loads((out / "items.json").read_text())
    found = {item["name"]: item["size"] for part in items.values() for item in part}
    assert found == sizes
    assert sum(len(part) for part in items.values()) == 24
    manifest = read_manifest(out)
    side = 16 if kind == "image" else 480
    for part, listed in items.items():
        windows = [np.prod([-(-n // side) for n in item["size"]]) for item in listed]
        assert manifest.samples[part] == sum(windows)
    assert main(["decode", str(out), "--out", str(decoded)]) == 0
    config, model = trained(encoded[kind])
    del config
    for part, listed in items.items():
        for i, item in enumerate(listed):
            if kind == "image":
                with Image.open(decoded / part / f"{i:06d}.png") as image:
                    assert [image.height, image.width] == item["size"]
                    first = torch.from_numpy(np.asarray(image)[:side, :side].copy())
                with Image.open(source / item["name"]) as image:
                    pixels = np.asarray(image)[:side, :side]
                padding = [(0, side - n) for n in pixels.shape[:2]]
                window = torch.from_numpy(np.pad(pixels, [*padding, (0, 0)], mode="edge"))
                batch = (window.permute(2, 0, 1)[None].float() / 127.5) - 1
                with torch.no_grad():
                    expected = model.reconstruct(batch)[0][0].clamp(-1, 1).permute(1, 2, 0)
                expected = ((expected + 1) * 127.5)[: first.shape[0], : first.shape[1]]
                # of another batch, so that a half may be rounded the other way
                assert_close(first.float(), expected, rtol=0, atol=0.51)
            else:
                clip, rate = soundfile.read(decoded / part / f"{i:06d}.wav")
                assert (len(clip), rate) == (item["size"][0], 8000)


def test_codes_whose_items_are_gone_or_others_are_refused(
    encoded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "codes"
    source.mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(256, size=(16, 20, 3)).astype(np.uint8)
        Image.fromarray(noise).save(source / f"{i:02d}.png")
    command = ["encode", str(encoded["image"] / "runs/run"), "--data", str(source)]
    assert main([*command, "--out", str(out)]) == 0
    items = out / "items.json"
    content = json.loads(items.read_text())
    content["train"][0]["size"][0] = 10**9
    for text in (json.dumps(content), "{}", "", '{"train": [], "held_out": []}'):
        items.write_text(text)
        capsys.readouterr()
        assert main(["decode", str(out), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "items.json" in line
    assert not (tmp_path / "out").exists()
    # the same command mends them
    assert main([*command, "--out", str(out)]) == 0
    assert main(["decode", str(out), "--out", str(tmp_path / "out")]) == 0
    assert main([*command, "--out", str(out), "--crops"]) == 2
    assert "holds other codes" in capsys.readouterr().err


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_language_model_on_codes_is_measured_in_bits_and_draws_new_samples(
    kind: str,
    encoded: dict[str, Path],
    tmp_path: Path,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = encoded[kind] / "codes"
    flags = [*LANGUAGE, "--data.source", str(codes)]
    config = CodesTask.fit_to_data(with_flags(Config(), flags, "train"))
    manifest = read_manifest(codes)
    assert config.data.vocabulary == manifest.codes * manifest.levels + 1
    summary = train_two_steps(config, tmp_path / "runs", world)
    assert_close(summary["val/bits_per_code"], summary["val/loss"] / np.log(2).item())
    assert summary["val/unigram_bits_per_code"] <= np.log2(manifest.codes)
    assert "val/bits_per_byte" not in summary
    assert "val/moe/mean/used" in summary
    lm = tmp_path / "runs/run"
    made, again = tmp_path / "made", tmp_path / "again"
    for out in (made, again):
        assert main(["generate", str(lm), "--samples", "3", "--out", str(out)]) == 0
    suffix = "wav" if kind == "audio" else "png"
    assert [path.name for path in sorted(made.iterdir())] == [f"{i:06d}.{suffix}" for i in range(3)]
    for path in made.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    if kind == "audio":
        shown = sorted(path.name for path in (lm / "samples/val_000002").iterdir())
        assert shown == [f"{i}_{name}.wav" for i in range(8) for name in ("held_out", "sample")]
    else:
        # eight held-out images above eight new ones
        with Image.open(lm / "samples/val_000002.png") as image:
            assert image.size == (8 * 16, 2 * 16)
    capsys.readouterr()
    assert main(["eval", str(lm)]) == 0
    assert_close(json.loads(capsys.readouterr().out)["val/loss"], summary["val/loss"])


def test_every_code_is_drawn_from_the_range_of_its_level() -> None:
    torch.manual_seed(0)
    moe = MoEConfig(experts=4, top_k=2, hidden=8)
    size = {"width": 16, "layers": 1, "heads": 2, "moe": moe}
    model = LanguageModel(11, 6, **size)
    start = torch.full((64, 1), 10)
    ranges = (range(5), range(5, 10))
    drawn = model.generate(start, 6, ranges=ranges, temperature=5.0)[:, 1:]
    for i in range(6):
        assert set(drawn[:, i].tolist()) == set(ranges[i % 2])


def test_samples_do_not_touch_the_random_numbers_of_the_training(
    encoded: dict[str, Path],
) -> None:
    flags = [*LANGUAGE, "--data.source", str(encoded["image"] / "codes")]
    task = build_task(CodesTask.fit_to_data(with_flags(Config(), flags, "train")))
    state = torch.get_rng_state()
    device = torch.device("cpu")
    first, again = (task.samples(step, device).picture for step in (1, 2))
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first, again)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.vocabulary", "600"), "data.vocabulary 600 with the codes in"),
        (("--data.context", "15"), "drop it, or use 16, a sample"),
        (("--data.document_mask", "True"), "data.document_mask True means nothing to the codes"),
        (("--data.streaming", "True"), "data.streaming True means nothing to the codes"),
    ],
)
def test_settings_that_do_not_fit_the_codes_are_refused(
    flags: tuple[str, str], words: str, encoded: dict[str, Path]
) -> None:
    source = ("--data.source", str(encoded["image"] / "codes"))
    with pytest.raises(ConfigError) as error:
        CodesTask.fit_to_data(with_flags(Config(), [*LANGUAGE, *source, *flags], "train"))
    assert words in str(error.value)


def test_codes_whose_tokenizer_is_gone_or_another_are_refused(
    encoded: dict[str, Path], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(encoded["image"], folder)
    command = ["decode", str(folder / "codes"), "--limit", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0  # both moved together
    (folder / "runs/run").rename(folder / "elsewhere")
    assert main([*command, str(tmp_path / "out2")]) == 2
    assert "was encoded by the run" in capsys.readouterr().err
    flags = [*LANGUAGE, "--data.source", str(folder / "codes")]
    with pytest.raises(ConfigError, match="which is gone"):
        CodesTask.fit_to_data(with_flags(Config(), flags, "train"))
    other = with_flags(Config(), [*TOKENIZERS["image"], "--seed", "1"], "train")
    train_two_steps(other, folder / "runs", world)
    assert main([*command, str(tmp_path / "out2")]) == 2
    assert "has other weights than those that encoded" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    "changed",
    [
        *({"grid": [2, 8]}, {"grid": [16]}, {"sample_shape": [3, 16, 17]}, {"codes": 33}),
        *({"sample_shape": [3, 2**30, 2**30]}, {"sample_shape": [3, 8, 8, 8, 8]}),
        *({"sample_rate": 8000}, {"tokenizer": {"run": "a\0b"}}),
    ],
)
def test_a_manifest_of_samples_that_the_tokenizer_does_not_make_is_refused(
    changed: dict[str, Any],
    encoded: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(encoded["image"] / "codes", tmp_path / "codes")
    (tmp_path / "runs").symlink_to(encoded["image"] / "runs")
    manifest = json.loads((tmp_path / "codes" / MANIFEST).read_text())
    if "tokenizer" in changed:
        changed = {"tokenizer": manifest["tokenizer"] | changed["tokenizer"]}
    (tmp_path / "codes" / MANIFEST).write_text(json.dumps(manifest | changed))
    out = tmp_path / "out"
    assert main(["decode", str(tmp_path / "codes"), "--out", str(out)]) == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "codes/manifest.json" in line


def test_a_run_on_codes_is_evaluated_on_codes_of_the_same_tokenizer_alone(
    encoded: dict[str, Path], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, photos = encoded["image"], tmp_path / "photos"
    config = with_flags(Config(), [*LANGUAGE, "--data.source", str(folder / "codes")], "train")
    train_two_steps(CodesTask.fit_to_data(config), tmp_path / "runs", world)
    command = ["eval", str(tmp_path / "runs/run"), "--data"]
    photos.mkdir()
    Image.effect_mandelbrot((128, 64), (-2, -1, 1, 1), 60).save(photos / "a.png")
    encode = ["encode", str(folder / "runs/run"), "--data", str(photos), "--crops"]
    assert main([*encode, "--out", str(tmp_path / "photos_codes")]) == 0
    capsys.readouterr()
    assert main([*command, str(tmp_path / "photos_codes")]) == 0
    of_photos = json.loads(capsys.readouterr().out)
    assert main(command[:-1]) == 0
    own = json.loads(capsys.readouterr().out)
    assert of_photos["val/bits_per_code"] != own["val/bits_per_code"]
    # the same sizes, other weights
    other = with_flags(Config(), [*TOKENIZERS["image"], "--seed", "1"], "train")
    train_two_steps(other, tmp_path / "others", world)
    assert main(["encode", str(tmp_path / "others/run"), *to(tmp_path / "others_codes")]) == 0
    hashes = [
        read_manifest(path).tokenizer.weights_sha256[:12]
        for path in (tmp_path / "others_codes", folder / "codes")
    ]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "others_codes")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in (*hashes, "encode the data with that one"))
    assert main([*command, str(photos)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--data {photos} holds no codes, which the run was trained on" in line


@pytest.mark.distributed
def test_two_ranks_write_the_bytes_of_one_and_train_on_them(
    encoded: dict[str, Path], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    folder = encoded["image"]
    # beside the shards of one rank, so that the run lies equally far away
    done = run_forked(
        "encode", str(folder / "runs/run"), *to(folder / "two"), cwd=tmp_path, ranks=2
    )
    assert done.returncode == 0, done.stderr
    for path in (folder / "codes").iterdir():
        assert path.read_bytes() == (folder / "two" / path.name).read_bytes(), path.name
    steps = ("--train.steps", "2", "--train.log_every", "1", "--data.source", str(folder / "two"))
    shared = ("--moe.expert_parallel", "2")
    lm, _ = two_ranks(train_flags, tmp_path, *LANGUAGE, *steps, *shared)
    config = merge_files(Config, [lm / "config.yaml"])
    assert (config.data.vocabulary, config.data.context) == (33, 16)
    assert "val/bits_per_code" in metrics(lm)[-1]
    assert (lm / "samples/val_000002.png").is_file()


def test_new_samples_decode_to_new_images(encoded: dict[str, Path]) -> None:
    decoder = Decoder(encoded["residual"] / "codes", torch.device("cpu"))
    flags = [*LANGUAGE, "--data.source", str(encoded["residual"] / "codes")]
    model = build_model(CodesTask.fit_to_data(with_flags(Config(), flags, "train")))
    assert isinstance(model, LanguageModel)
    random = torch.Generator().manual_seed(0)
    drawn = draw_sequences(model, decoder.manifest, 2, generator=random)
    assert drawn.shape == (2, 2 * 16 + 1)
    assert decoder.decode(drawn).shape == (2, 3, 16, 16)
