import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from export_nets import SPEC, images
from PIL import Image

import prunectl
from prunectl.data.images import preprocess
from prunectl.errors import CorruptFile, UsageError
from prunectl.export import onnx, session
from prunectl.export.artifact import InputSpec, record_path

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 12, 3), dtype=np.uint8)  # NHWC


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tx2_model, tx2):
    path = tmp_path_factory.mktemp("saved") / "model.onnx"
    onnx.save(tx2_model, path, spec=SPEC, profile=tx2)
    return path


@pytest.fixture(scope="module")
def loaded(saved):
    return prunectl.load_onnx_session(saved)


def test_every_way_to_pass_an_image_gives_the_same_logits(loaded):
    exact = loaded.run(PIXELS)
    assert exact.shape == (5, 5)
    mean, std = np.float32(SPEC.mean).reshape(-1, 1, 1), np.float32(SPEC.std).reshape(-1, 1, 1)
    chw = PIXELS.transpose(0, 3, 1, 2)
    for same in (
        loaded.run(chw),
        loaded.run(PIXELS / 255),
        loaded.run((chw / 255).astype(np.float32)),
        loaded.run_normalised((chw / 255 - mean) / std),
        np.concatenate([loaded.run(p) for p in PIXELS]),
    ):
        np.testing.assert_allclose(same, exact, rtol=1e-5, atol=1e-5)  # normalised in float32 or float64


def test_a_pixel_file_answers_the_same(tmp_path, tx2_model, loaded, orin, orin_model):
    spec = SPEC.of_pixels()
    onnx.save(onnx.lowered(orin_model, spec, orin, "fp32"), tmp_path / "pixels.onnx", spec=spec, profile=orin)
    pixels = session.load_onnx_session(tmp_path / "pixels.onnx", threads=1)
    for ask in (lambda s: s.run(PIXELS), lambda s: s.run(PIXELS / 255), lambda s: s.run_normalised(images().numpy())):
        np.testing.assert_allclose(ask(pixels), ask(loaded), rtol=1e-5, atol=1e-5)


def test_what_is_no_image_is_refused(loaded):
    with pytest.raises(UsageError, match=r"shape \(5, 12, 16, 3\); expected \(N, 3, 16, 12\) or \(N, 16, 12, 3\)"):
        loaded.run(PIXELS.transpose(0, 2, 1, 3))
    with pytest.raises(UsageError, match="run_normalised"):
        loaded.run(images().numpy())
    with pytest.raises(UsageError, match="uint8"):
        loaded.run(PIXELS.astype(np.int64))
    assert loaded.run(np.zeros((0, 3, 16, 12), np.uint8)).shape == (0, 5)


def test_a_picture_gets_ranked_classes(loaded):
    square = InputSpec((3, 16, 16), SPEC.mean, SPEC.std, SPEC.classes, "d", "resize")
    assert session.prepare(Image.fromarray(PIXELS[0]), square).shape == (1, 3, 16, 16)


def test_one_file_can_be_loaded_without_its_json_but_not_with_another_s(tmp_path, saved):
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(saved.read_bytes())
    assert session.load_onnx_session(alone).spec == SPEC
    record_path(alone).write_text(record_path(saved).read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(CorruptFile, match="sha256 differs"):
        session.load_onnx_session(alone)


def test_files_that_are_none_of_ours(tmp_path, tx2_model):
    with pytest.raises(UsageError, match="not a file"):
        session.load_onnx_session(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(CorruptFile, match=r"bad\.onnx"):
        session.load_onnx_session(tmp_path / "bad.onnx")
    (tmp_path / "foreign.onnx").write_bytes(tx2_model.SerializeToString())
    with pytest.raises(UsageError, match="how to prepare an image"):
        session.load_onnx_session(tmp_path / "foreign.onnx")


@pytest.mark.parametrize(
    ("fit", "size", "picture"), [("none", 20, (20, 20)), ("pad", 24, (20, 20)), ("pad", 25, (20, 20)), ("resize-crop", 28, (50, 41))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_prepared_exactly_as_for_training(fit, size, picture, channels):
    w, h = picture
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (h, w, 3), dtype=np.uint8))
    spec = InputSpec((channels, size, size), (0.4,) * channels, (0.3,) * channels, ("a",), "d", fit)
    ours = session._normalised(session.prepare(image, spec), spec)
    theirs = preprocess(image, channels=channels, image_size=size, fit=fit, mean=spec.mean, std=spec.std).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_larger_picture_is_brought_to_its_own_size_before_the_border(tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    spec = InputSpec((3, 24, 24), SPEC.mean, SPEC.std, ("a",), "d", "pad", native=20)
    padded = session.prepare(image, spec)
    assert np.array_equal(padded, session.prepare(image.resize((20, 20), Image.Resampling.BILINEAR), spec))
    assert padded[..., :2].max() == 0 and padded[0, :, 2:22, 2:22].min() > 0
    texts = spec.to_metadata()
    assert InputSpec.from_metadata(texts) == spec
    del texts["native"]  # as in older files
    assert InputSpec.from_metadata(texts).native == 0


@pytest.mark.parametrize("size", [16, 48])
def test_resizing_is_that_of_training_to_a_grey_level(size):
    """Pillow rounds after each axis and torch once, so on noise a quarter of the pixels may be off by one, none by more."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    spec = InputSpec((3, size, size), (0.0,) * 3, (1 / 255,) * 3, ("a",), "d", "resize")
    ours = session.prepare(image, spec).astype(int)
    theirs = np.rint(preprocess(image, channels=3, image_size=size, fit="resize", mean=spec.mean, std=spec.std).numpy()).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.7


def test_loading_a_session_imports_no_torch(saved):
    code = f"import sys, prunectl; prunectl.load_onnx_session({str(saved)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_free_batch_is_fed_in_pieces(tmp_path, network, orin):
    """Memory must not grow with the data set; a fixed one is filled up."""
    for batch, sizes in ((None, [32, 32, 6]), (4, [4] * 18)):
        path = tmp_path / f"{batch}.onnx"
        onnx.save(onnx.build(network, SPEC, orin, batch=batch), path, spec=SPEC, profile=orin)
        loaded, fed = prunectl.load_onnx_session(path), []
        run = loaded.session.run
        watched = SimpleNamespace(get_inputs=loaded.session.get_inputs, get_outputs=loaded.session.get_outputs)
        watched.run = lambda names, feed, run=run, fed=fed: fed.append(len(next(iter(feed.values())))) or run(names, feed)
        pixels = np.random.default_rng(1).integers(0, 256, (70, *SPEC.shape), dtype=np.uint8)
        answers = session.OnnxSession(watched, SPEC).run(pixels)
        assert fed == sizes and answers.shape == (70, 5)
