"""What was trained, used: own pictures, own data sets, exports, versions."""

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import SHADES, contents, error_line, make_pictures, network_of, picture, read_table
from PIL import Image

import part2_cifar_cnn as part2
import utils


def train(dataset, output, *options):
    """Exit status of a short training on a folder of pictures."""
    how = ["--dataset", str(dataset), "--epochs", "2", "--batch-size", "16", "--device", "cpu"]
    how += ["--precision", "float32", "--output-dir", str(output)]
    return part2.main([*how, *options])


@pytest.fixture(scope="session")
def shades(tmp_path_factory):
    """Pictures in the folders train and test, of three classes that are easily told apart."""
    folder = tmp_path_factory.mktemp("data") / "shades"
    make_pictures(folder / "train", SHADES, 20, seed=0)
    make_pictures(folder / "test", SHADES, 5, seed=1)
    return folder


@pytest.fixture(scope="session")
def shades_run(shades, tmp_path_factory):
    """Folder of a training on these pictures."""
    folder = tmp_path_factory.mktemp("shades")
    assert train(shades, folder) == 0
    return folder


# ---------------------------------------------------------------- one picture


def read(image, **how):
    """A picture as part 2 sees it after a file of it was written."""
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | how))
    file.seek(0)
    return utils.read_picture(file)


def test_a_picture_of_32_by_32_is_read_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(read(Image.fromarray(pixels)), pixels)


def test_the_middle_square_is_made_small_with_antialiasing():
    pixels = np.zeros((64, 256, 3), np.uint8)
    pixels[:, 96:160] = 255 * (np.arange(64) % 2)[:, None]  # lines of one pixel in the middle
    found = read(Image.fromarray(pixels)).astype(int)
    assert abs(found - 127.5).max() < 40  # without antialiasing 0 or 255
    for size in [(1, 1), (1, 500), (500, 1), (3, 2)]:
        assert (read(Image.new("RGB", size, (9, 99, 200))) == (9, 99, 200)).all()


def sixteen_bits(kind, **how):
    return Image.fromarray(np.full((8, 8), 20_000, kind)), how


MODES = {  # all of them show this grey, or a red, as what is left of it
    "1": (Image.new("1", (8, 8), 1), {}, 255),
    "L": (Image.new("L", (8, 8), 78), {}, 78),
    "LA": (Image.new("LA", (8, 8), (78, 255)), {}, 78),
    "LA, see-through": (Image.new("LA", (8, 8), (78, 0)), {}, 255),
    "RGBA, half": (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), {}, 127),
    "P": (Image.new("RGB", (8, 8), (78, 78, 78)).quantize(2), {"format": "GIF"}, 78),
    "P, see-through": (Image.new("L", (8, 8), 78).convert("P"), {"transparency": 78}, 255),
    "L, see-through": (Image.new("L", (8, 8), 3), {"transparency": 3}, 255),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 0, 0, 177)), {"format": "TIFF"}, 78),
    "YCbCr": (Image.new("YCbCr", (8, 8), (78, 128, 128)), {"format": "JPEG"}, 78),
    "I;16": (*sixteen_bits(np.uint16), 78),
    "I;16, dark": (Image.fromarray(np.full((8, 8), 255, np.uint16)), {}, 1),
    "I": (*sixteen_bits(np.int32, format="TIFF"), 78),
    "F": (Image.fromarray(np.full((8, 8), 0.306, np.float32)), {"format": "TIFF"}, 78),
    "F, beyond": (Image.fromarray(np.full((8, 8), 1e30, np.float32)), {"format": "TIFF"}, 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_same_colour(mode):
    image, how, grey = MODES[mode]
    found = read(image, **how).astype(int)
    assert found.shape == (32, 32, 3) and abs(found - grey).max() <= 1


def test_a_camera_held_sideways_and_an_animation():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: what was above is on the right
    found = read(Image.fromarray(pixels), exif=exif)
    assert found[:, 20:].min() > 200 and found[:, :12].max() < 50
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    found = read(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert (found == (255, 0, 0)).all()


def test_a_large_photograph_is_read_in_little_time_and_as_well():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((1500, 1000), Image.Resampling.BICUBIC)
    found, whole = (read(large, format=f, quality=95).astype(int) for f in ("JPEG", "PNG"))
    assert abs(found - whole).mean() < 2


def test_a_huge_picture_is_read_or_refused_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    assert (read(Image.new("L", (100, 100), 7)) == 7).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(ValueError, match="decompression bomb"):
        read(Image.new("L", (100, 100), 7))
    assert not recwarn.list


def test_postscript_is_not_run():
    with pytest.raises(ValueError, match="PostScript"):
        read(Image.new("L", (100, 100), 7), format="EPS")


def test_what_is_no_picture_is_said_in_one_line(tmp_path):
    whole = io.BytesIO()
    picture(99, np.random.default_rng(0)).save(whole, "PNG")
    text, half = tmp_path / "text.png", tmp_path / "half.png"
    text.write_text("no picture")
    half.write_bytes(whole.getvalue()[:2000])
    os.mkfifo(tmp_path / "fifo.png")  # to open it would be to wait for ever
    for path in (text, half, tmp_path, tmp_path / "missing.png", tmp_path / "fifo.png"):
        with pytest.raises(ValueError) as caught:
            utils.read_picture(path)
        assert len(str(caught.value).splitlines()) == 1 and str(tmp_path) not in str(caught.value)


# ------------------------------------------------------------- a labelled folder


def test_a_folder_of_pictures_is_trained_on_as_cifar10_is(shades, shades_run):
    config = json.loads((shades_run / "config.json").read_text())
    metrics = json.loads((shades_run / "metrics.json").read_text())
    assert config["dataset"] == str(shades) and config["classes"] == 3
    assert list(metrics["per_class"]) == list(SHADES)
    assert metrics["accuracy"] > 0.9
    model = network_of(shades_run / "best.pt")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    scores = read_table(shades_run / "test_scores.csv")
    assert list(scores[0]) == ["label", *SHADES] and len(scores) == 15
    assert sum(name.endswith(".png") for name in contents(shades_run)) > 5


def test_it_has_its_own_mean_and_deviation_and_its_own_order(shades):
    data = part2.load_folder(shades, 32)
    pixels = data.train.images.double() / 255
    for found, expected in (
        (data.mean, pixels.mean((0, 1, 2))),
        (data.std, pixels.std((0, 1, 2))),
    ):
        assert torch.allclose(torch.tensor(found).double(), expected, atol=1e-5)
    assert data.classes == tuple(sorted(SHADES)) and data.train.images.dtype == torch.uint8
    assert data.train.labels.bincount().tolist() == [20] * 3
    files = [path for name in data.classes for path in sorted((shades / "test" / name).iterdir())]
    expected = np.stack([utils.read_picture(path) for path in files])
    assert np.array_equal(data.test.images, expected)


def test_without_a_test_folder_a_fifth_of_each_class_tests(shades, tmp_path):
    shutil.copytree(shades / "train", tmp_path / "train")
    data = part2.load_folder(tmp_path, 32)
    assert data.test.labels.bincount().tolist() == [4] * 3 and len(data.train) == 48
    again = part2.load_folder(tmp_path, 32)
    assert torch.equal(data.test.images, again.test.images)


@pytest.mark.parametrize("model", part2.MODELS)
def test_networks_have_as_many_outputs_as_there_are_classes(model):
    for classes in (2, 137):
        network = part2.build_model({"model": model, "dropout": 0.5, "classes": classes})
        assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


def test_a_checkpoint_without_a_number_of_classes_has_ten():
    checkpoint = torch.load(Path(part2.__file__).parent / "outputs/part2/best.pt")
    checkpoint["config"].pop("classes", None)
    model = part2.build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_constant_channel_is_trained_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(part2, "FIGURES", {})
    for name in ("a", "b"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        for i in range(5):
            shade = (i, 50 * (name == "b"), 0)
            Image.new("RGB", (9, 9), shade).save(tmp_path / f"data/train/{name}/{i}.png")
    assert train(tmp_path / "data", tmp_path / "run") == 0
    assert len(read_table(tmp_path / "run/history.csv")) == 2


def damage(folder, what):
    """Make the folder one that cannot be trained on."""
    if what == "damaged":
        (folder / "train/dark/05.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
        (folder / "test/grey/01.png").write_text("no picture")
    elif what == "another class":
        (folder / "test/pink").mkdir()
    elif what == "an empty class":
        shutil.rmtree(folder / "test/dark")
        (folder / "test/dark").mkdir()
    elif what == "few":
        for path in sorted((folder / "train/dark").iterdir())[4:]:
            path.unlink()
    elif what == "one class":
        for name in list(SHADES)[1:]:
            shutil.rmtree(folder / "train" / name)
    else:
        (folder / "train").rename(folder / "training")


@pytest.mark.parametrize(
    "what, named",
    {
        "damaged": "2 of 75 files are no pictures",
        "another class": "test",
        "an empty class": "test",
        "few": "five or more pictures",
        "one class": "two or more folders",
        "no train": "train",
    }.items(),
)
def test_what_cannot_be_trained_on_is_said_before_training(shades, tmp_path, capsys, what, named):
    shutil.copytree(shades, tmp_path / "shades")
    damage(tmp_path / "shades", what)
    assert train(tmp_path / "shades", tmp_path / "run") == 2
    text = error_line(capsys)
    assert named in text and not (tmp_path / "run").exists()
    if what == "damaged":
        assert "05.png" in text and "01.png" in text


def test_a_data_set_that_is_neither_a_name_nor_a_folder_is_refused(tmp_path, capsys):
    assert train(tmp_path / "missing", tmp_path / "run") == 2
    assert "cifar10" in error_line(capsys)


def test_hidden_files_are_no_pictures_and_no_class_and_folders_are_not_searched(shades, tmp_path):
    shutil.copytree(shades, tmp_path / "shades")
    (tmp_path / "shades/train/.cache").mkdir()
    (tmp_path / "shades/train/dark/.DS_Store").write_text("no picture")
    (tmp_path / "shades/train/dark/deeper").mkdir()
    assert len(part2.load_folder(tmp_path / "shades", 32).train) == 60


def test_a_run_on_a_folder_is_continued_and_judged_again(shades_run, tmp_path, monkeypatch):
    monkeypatch.setattr(part2, "FIGURES", {})
    folder = tmp_path / "run"
    shutil.copytree(shades_run, folder)
    assert part2.main(["--resume", str(folder), "--epochs", "3"]) == 0
    assert len(read_table(folder / "history.csv")) == 3
    assert part2.main(["--evaluate", str(folder)]) == 0


# ------------------------------------------------------------------- predictions


def predict(checkpoint, output, *pictures):
    """Exit status of --predict on the CPU."""
    how = ["--checkpoint", str(checkpoint), "--device", "cpu", "--output-dir", str(output)]
    return part2.main([*how, "--predict", *map(str, pictures)])


def test_own_pictures_are_read_as_large_as_the_network_sees_them(shades, tmp_path, untraced):
    size = ["--model", "resnet18", "--image-size", "16:0.5,48:0.5", "--flip", "none"]
    assert train(shades, tmp_path / "run", *size, "--epochs", "2") == 0
    data = part2.load_folder(shades, 48)
    assert data.test.images.shape == (15, 48, 48, 3)
    files = sorted((shades / "test" / "grey").iterdir())
    assert predict(tmp_path / "run", tmp_path / "out", *files) == 0
    expected = in_float32(tmp_path / "run", data.test.images)
    scores = read_table(tmp_path / "run" / "test_scores.csv")
    found = np.array([[float(row[name]) for name in data.classes] for row in scores])
    assert np.allclose(found, expected, atol=0.02)
    assert part2.main(["--export", str(tmp_path / "run")]) == 0
    model = torch.export.load(tmp_path / "run" / "model.pt2").module()
    assert np.allclose(model(data.test.images), expected, atol=1e-5)


def test_pictures_get_the_probabilities_that_the_test_images_had(shades, shades_run, tmp_path):
    folders = [shades / "test" / name for name in sorted(SHADES)]
    assert predict(shades_run, tmp_path, *folders) == 0
    rows = read_table(tmp_path / "predictions.csv")
    files = [str(path) for folder in folders for path in sorted(folder.iterdir())]
    assert [row["file"] for row in rows] == files
    for row, scores in zip(rows, read_table(shades_run / "test_scores.csv")):
        expected = sorted(((float(scores[name]), name) for name in SHADES), reverse=True)
        for i, (share, name) in enumerate(expected, 1):
            assert row[f"class_{i}"] == name
            assert float(row[f"probability_{i}"]) == pytest.approx(share, abs=2e-6)
    assert contents(tmp_path).keys() == {"predictions.csv", "predictions.png"}


def test_columns_are_the_documented_ones_and_the_screen_says_what_the_network_cannot(
    shades, shades_run, tmp_path, capsys
):
    picture(250, np.random.default_rng(0), (700, 300)).save(tmp_path / "a b, c.jpg")
    assert predict(shades_run / "best.pt", tmp_path / "out", tmp_path / "a b, c.jpg") == 0
    header, row = (tmp_path / "out/predictions.csv").read_text().splitlines()
    places = ",".join(f"class_{i},probability_{i}" for i in (1, 2, 3))
    assert header == f"file,{places}" and row.startswith(
        f'"{tmp_path}/a b, c.jpg","light, $_{{$",'
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "a b, c.jpg light" in text and "3 classes and nothing else" in text


def test_what_is_no_picture_is_passed_over_and_named_at_the_end(
    shades, shades_run, tmp_path, capsys
):
    shutil.copytree(shades / "test/dark", tmp_path / "mixed")
    (tmp_path / "mixed/notes.txt").write_text("no picture")
    (tmp_path / "mixed/.hidden").write_text("no picture")
    out = tmp_path / "out"
    assert predict(shades_run, out, tmp_path / "mixed", tmp_path / "gone.png") == 1
    printed = capsys.readouterr()
    assert printed.err == "error: 2 of 7 files cannot be read as pictures\n"
    assert "notes.txt (it is no picture)\n" in printed.out
    assert "gone.png (No such file or directory)\n" in printed.out
    assert len(read_table(out / "predictions.csv")) == 5


def test_nothing_to_predict_is_an_error(shades_run, tmp_path, capsys):
    empty, text = tmp_path / "empty", tmp_path / "text.png"
    empty.mkdir()
    text.write_text("no picture")
    for what in (empty, text, tmp_path / "gone"):
        assert predict(shades_run, tmp_path / "out", what) == 2
        assert what.name in error_line(capsys)
        assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "options, named",
    {
        "--predict x --lr 1": "leave others out",
        "--export x --threads 1": "leave others out",
        "--checkpoint x": "is for --predict",
        "--predict x --tensorboard": "is for training",
        "--predict x --resume": "not allowed with",
    }.items(),
)
def test_options_without_effect_beside_predict_and_export_are_refused(options, named, capsys):
    assert part2.main(options.split()) == 2
    assert named in error_line(capsys)


def test_odd_file_names_reach_screen_table_and_picture(shades, shades_run, tmp_path, capsys):
    names = ["line\nbreak.png", "\x1b[31mred.png", "café $x.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        shutil.copy(shades / "test/dark/00.png", tmp_path / name)
    assert predict(shades_run, tmp_path / "out", *(tmp_path / name for name in names)) == 0
    files = [Path(row["file"]).name for row in read_table(tmp_path / "out/predictions.csv")]
    assert files == [*names[:3], "caf\\udce9.png"]
    assert "\x1b" not in capsys.readouterr().out


def test_many_files_are_read_in_batches_and_the_first_of_them_drawn(
    shades, shades_run, tmp_path, monkeypatch, capsys
):
    sizes, batches = [], utils.read_pictures

    def by_seven(paths, side):
        for images, good, bad in batches(paths, side, size=7):
            sizes.append(len(images))
            yield images, good, bad

    monkeypatch.setattr(utils, "read_pictures", by_seven)
    folder = shades / "train/grey"
    (tmp_path / "text").write_text("no picture")  # a batch of nothing else
    texts = [tmp_path / "text"] * 7
    assert predict(shades_run, tmp_path / "out", *texts, folder, folder) == 1
    rows = read_table(tmp_path / "out/predictions.csv")
    assert sizes == [0, 7, 7, 7, 7, 7, 5] and len(rows) == 40
    assert "The other 16 are in predictions.csv." in capsys.readouterr().out
    assert [row["class_1"] for row in rows[:20]] == [row["class_1"] for row in rows[20:]]


# -------------------------------------------------------------- export and version


@pytest.fixture
def untraced():
    """Without pytest's log handler, for which torch would write down each step of an export."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def checkpoint(folder, preset, data, **change):
    """A folder with a best.pt of a network that was trained on nothing but is sure of itself."""
    settings = replace(part2.Settings(**part2.PRESETS[preset]), **change)
    torch.manual_seed(0)
    model = part2.build_model(part2.config_of(settings, data.classes))
    about = data.classes, data.mean, data.std, data.mirror
    history = [dict.fromkeys(part2.HISTORY, 0.5) | {"epoch": 1, "temperature": 1.7}]
    network = part2.Network(model, settings, *about, history, len(history))
    with torch.no_grad():
        logits = part2.predict(
            replace(network, settings=replace(settings, device="cpu")), data.test.images
        )
        last = [p for p in model.parameters() if p.ndim == 2][-1]
        last.mul_(5 / logits.std())
    folder.mkdir()
    utils.save_checkpoint(folder / "best.pt", **part2.contents(network))
    return folder


ALONE = """
import json, sys, torch
about = {"version.json": ""}
model = torch.export.load(sys.argv[1], extra_files=about).module()
probs = {n: model(torch.load(sys.argv[2])[:n]).tolist() for n in (1, 3, 64)}
print(json.dumps({"probs": probs, "about": json.loads(about["version.json"])}))
assert not {"part2_cifar_cnn", "utils", "torchvision", "matplotlib"} & set(sys.modules)
"""


def in_float32(folder, images):
    """Probabilities of a checkpoint's network, computed in float32 on the CPU."""
    network = part2.load_network(folder)
    settings = replace(network.settings, device="cpu", precision="float32")
    return part2.probabilities(replace(network, settings=settings), images)


@pytest.mark.parametrize("preset", part2.PRESETS)
def test_an_export_computes_what_the_checkpoint_does(preset, tmp_path, digits, untraced):
    data = replace(digits, mirror=True)  # so that there are all views
    folder = checkpoint(tmp_path / "run", preset, data, precision="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert part2.main(["--export", str(folder)]) == 0
    assert contents(folder).keys() == {"best.pt", "model.pt2"}
    images = data.test.images[:20]
    expected = in_float32(folder, images)
    assert expected.max() > 0.3
    model = torch.export.load(folder / "model.pt2").module()
    for n in (1, 3, 20):
        assert abs(model(images[:n]) - expected[:n]).max() < 1e-5
    assert str(Path(part2.__file__).parent).encode() not in (folder / "model.pt2").read_bytes()


def test_onnx_computes_what_the_checkpoint_does(tmp_path, digits, untraced):
    """The tuned network has every kind of layer, and a pool that ONNX lacks."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"install {package} to run this test")
    import onnxruntime

    data = replace(digits, mirror=True)
    folder = checkpoint(tmp_path / "run", "tuned", data)
    assert part2.main(["--export", str(folder)]) == 0
    images = data.test.images[:20]
    expected = in_float32(folder, images)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["version.json"])
    assert about["classes"] == list(data.classes) and len(about["sha256"]) == 64
    for n in (1, 3, 20):
        (probs,) = session.run(None, {session.get_inputs()[0].name: images[:n].numpy()})
        assert probs.dtype == np.float32 and abs(probs - expected[:n].numpy()).max() < 1e-5


def test_an_export_needs_nothing_but_torch_and_tells_its_version(
    shades, shades_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert (
        part2.main(["--export", str(shades_run / "best.pt"), "--output-dir", str(tmp_path)]) == 0
    )
    images = part2.load_folder(shades, 32).train.images
    torch.save(images, tmp_path / "images.pt")
    command = [
        sys.executable,
        "-c",
        ALONE,
        str(tmp_path / "model.pt2"),
        str(tmp_path / "images.pt"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found, expected = json.loads(done.stdout), in_float32(shades_run, images)
    assert found["probs"].keys() == {"1", "3", "64"}
    for n, probs in found["probs"].items():
        assert torch.allclose(torch.tensor(probs), expected[: int(n)], atol=1e-5)
    about, metrics = found["about"], json.loads((shades_run / "metrics.json").read_text())
    assert about["classes"] == list(part2.load_network(shades_run).classes)
    assert metrics["versions"] == [{key: about[key] for key in metrics["versions"][0]}]


def test_a_version_is_the_hash_of_best_pt_the_settings_the_libraries_and_the_data(
    shades, shades_run
):
    (version,) = json.loads((shades_run / "metrics.json").read_text())["versions"]
    best = (shades_run / "best.pt").read_bytes()
    assert version["sha256"] == hashlib.sha256(best).hexdigest()
    config = json.loads((shades_run / "config.json").read_text())
    assert version["config"] | {"machine": version["machine"]} == config
    assert version["machine"]["torchvision"] == torchvision.__version__
    data = part2.load_folder(shades, 32)
    pixels = data.test.images.numpy().tobytes() + data.test.labels.numpy().tobytes()
    assert version["data_md5"].keys() == {"train", "test"}
    assert version["data_md5"]["test"] == hashlib.md5(pixels).hexdigest()


def test_the_version_of_cifar10_is_told_by_the_md5_of_its_files(tiny):
    settings = part2.Settings(dataset="cifar10", device="cpu")
    files = {name: md5 for name, md5 in tiny.md5.items() if name != "batches.meta"}
    assert part2.load_data(settings, tiny.folder).md5 == files and len(files) == 6


def test_a_run_is_not_continued_on_other_pictures(shades, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(part2, "FIGURES", {})
    shutil.copytree(shades, tmp_path / "shades")
    assert train(tmp_path / "shades", tmp_path / "run") == 0
    capsys.readouterr()
    (tmp_path / "shades/train/dark/00.png").unlink()
    assert part2.main(["--resume", str(tmp_path / "run"), "--epochs", "3"]) == 2
    assert "images" in error_line(capsys)


def test_without_its_packages_there_is_no_onnx_and_a_line_names_them(
    shades_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert part2.main(["--export", str(shades_run), "--output-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "onnx and onnxscript" in text and contents(tmp_path).keys() == {"model.pt2"}


def test_an_export_that_computes_something_else_is_not_written(
    shades_run, tmp_path, capsys, monkeypatch
):
    truth = part2.probabilities
    monkeypatch.setattr(part2, "probabilities", lambda *a: truth(*a) + 1e-4)
    assert part2.main(["--export", str(shades_run), "--output-dir", str(tmp_path)]) == 1
    assert "model.pt2" in error_line(capsys) and not contents(tmp_path)


def test_a_new_training_removes_the_export_of_the_one_it_replaces(
    shades, shades_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(part2, "FIGURES", {})
    shutil.copytree(shades_run, tmp_path / "run")
    for name in ("model.pt2", "model.onnx"):
        (tmp_path / "run" / name).write_text("old")
    assert train(shades, tmp_path / "run") == 0
    assert not {"model.pt2", "model.onnx"} & contents(tmp_path / "run").keys()


def test_a_run_is_not_judged_on_other_pictures(shades, shades_run, tmp_path, capsys):
    copy = shutil.copytree(shades_run, tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        stored = utils.load_checkpoint(copy / name)
        stored["data_md5"] = {"train": "0", "test": "0"}
        utils.save_checkpoint(copy / name, **stored)
    assert part2.main(["--evaluate", str(copy), "--output-dir", str(tmp_path / "out")]) == 2
    assert "other images" in error_line(capsys) and not (tmp_path / "out").exists()


def test_of_the_fewest_pictures_one_of_each_class_is_held_out(tmp_path, capsys):
    make_pictures(tmp_path / "few" / "train", SHADES, 5, seed=0)
    assert train(tmp_path / "few", tmp_path / "run") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "9 training, 3 validation, 3 test images" in text


def test_flip_none_keeps_own_pictures_from_being_mirrored_in_any_view(shades):
    settings = part2.Settings(dataset=str(shades), device="cpu", tta="shift")
    for flip in ("random", "none"):
        data = part2.load_data(replace(settings, flip=flip), None)
        assert data.mirror == (flip == "random")


def test_class_names_that_cannot_be_printed_are_refused(shades, tmp_path, capsys):
    folder = shutil.copytree(shades, tmp_path / "odd")
    (folder / "train" / "dark").rename(folder / "train" / "a\x1b[31m")
    assert train(folder, tmp_path / "run") == 2
    assert "cannot be printed" in error_line(capsys)


def test_no_export_is_left_beside_that_of_another_network(
    shades_run, tmp_path, untraced, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (tmp_path / "model.onnx").write_text("of another network")
    assert part2.main(["--export", str(shades_run), "--output-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2"}
    model = torch.export.load(tmp_path / "model.pt2").module()
    assert not model(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).requires_grad
    other = shutil.copytree(shades_run, tmp_path / "other")
    capsys.readouterr()
    assert part2.main(["--export", str(shades_run), "--output-dir", str(other)]) == 2
    assert "holds a run" in error_line(capsys)


def test_predictions_do_not_go_among_the_pictures(shades, shades_run, capsys):
    folder = shades / "test" / "dark"
    assert predict(shades_run, folder, folder) == 2
    assert "holds the pictures" in error_line(capsys)
    assert not (folder / "predictions.csv").exists()


def test_without_a_run_predict_says_to_train_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert part2.main(["--predict", "cat.png"]) == 2
    assert "train first" in error_line(capsys)
