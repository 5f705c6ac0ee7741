"""Images of 1 to 16 channels: what is read, what is refused, and by every loader the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from file_kinds import smooth_picture
from PIL import Image

from sdmp_kernels.views import ViewRecipe
from sdmp_train.data import DataError, Index, make_loader, open_folder, open_source
from sdmp_train.data.channels import decode, size_of


def stack(channels: int, seed: int = 0, dtype: type = np.uint8, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, np.iinfo(dtype).max, (*size, channels), dtype=dtype, endpoint=True)


def save_tiff(path: Path, pixels: np.ndarray) -> None:
    first, *others = (Image.fromarray(pixels[:, :, channel]) for channel in range(pixels.shape[2]))
    first.save(path, save_all=True, append_images=others)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 4, 12, 16])
def test_npy_and_tiff_of_grey_frames(tmp_path: Path, channels: int, dtype: type) -> None:
    pixels = stack(channels, dtype=dtype)
    eight = pixels if dtype is np.uint8 else np.rint(pixels / 65535 * 255).astype(np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    assert size_of(str(tmp_path / "a.npy"), channels) == (20, 30)
    np.testing.assert_array_equal(decode(str(tmp_path / "a.npy"), channels), eight)
    save_tiff(tmp_path / "a.tif", pixels)
    assert size_of(str(tmp_path / "a.tif"), channels) == (20, 30)
    if channels > 1:
        np.testing.assert_array_equal(decode((tmp_path / "a.tif").read_bytes(), channels), eight)
        with pytest.raises(ValueError, match=f"has {channels} frames; expected 7 channels"):
            decode(str(tmp_path / "a.tif"), 7)


def test_grey_is_what_it_is_and_colours_become_luma(tmp_path: Path) -> None:
    colours = smooth_picture(np.random.default_rng(0), 30, 20)
    colours.save(tmp_path / "c.png")
    colours.convert("L").save(tmp_path / "g.png")
    deep = stack(1, dtype=np.uint16)[:, :, 0]
    Image.fromarray(deep).save(tmp_path / "d.png")
    np.testing.assert_array_equal(decode(str(tmp_path / "c.png"), 1)[:, :, 0], np.asarray(colours.convert("L")))
    np.testing.assert_array_equal(decode(str(tmp_path / "g.png"), 1)[:, :, 0], np.asarray(colours.convert("L")))
    np.testing.assert_array_equal(decode(str(tmp_path / "d.png"), 1)[:, :, 0], np.rint(deep / 65535 * 255))
    colours.convert("RGBA").save(tmp_path / "a.png")
    assert decode(str(tmp_path / "a.png"), 4).shape == (20, 30, 4)
    with pytest.raises(ValueError, match="has pixels of type RGB; expected 4 channels"):
        decode(str(tmp_path / "c.png"), 4)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (stack(5), r"expected \(H, W, 6\)"),
        (stack(6).astype(np.float32), "float32"),
        (np.asfortranarray(stack(6)), "Fortran"),
        (np.array([{"a": 1}], dtype=object), "object|expected"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, pixels: np.ndarray, said: str) -> None:
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(ValueError, match=said):
        decode(str(tmp_path / "a.npy"), 6)


def test_a_header_that_lies_takes_no_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stack(6))
    data = (tmp_path / "a.npy").read_bytes()
    for other in (data[:-1], data + b"x", data.replace(b"(20, 30, 6)", b"(99999, 9, 6)"[:11].ljust(11))):
        with pytest.raises(ValueError, match=r"holds|header"):
            decode(other, 6)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("twelve")
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(6):
            np.save(root / name / f"{i}.npy", stack(12, seed=i, size=(30 + i, 40)))
    save_tiff(root / "a" / "7.tif", stack(12, seed=9))
    return open_folder(root, channels=12, check="decode", cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_folder_and_both_loaders(twelve: Index) -> None:
    assert len(twelve) == 13 and twelve.classes == ("a", "b") and twelve.channels == 12
    recipe = ViewRecipe(24, jitter=(0.4, 0.4, 0, 0), jitter_prob=1, blur_prob=1)
    found = []
    for loader in ("torchvision", "resident", "auto"):
        with make_loader(
            twelve, [recipe], batch_size=6, steps=2, seed=0, device="cpu", workers=0, loader=loader
        ) as made:
            found.append([batch.views[0] for batch in made])
            assert "12" in made.why or loader != "auto"
    assert found[0][0].shape == (6, 12, 24, 24)
    assert all((a == b).all() and (a == c).all() for a, b, c in zip(*found, strict=True))
    with pytest.raises(DataError, match="DALI reads images of 3 channels here, and these have 12"):
        make_loader(twelve, [recipe], batch_size=6, steps=2, seed=0, device="cpu", loader="dali")


def test_arrays_beside_images_are_papers_for_rgb(twelve: Index, tmp_path: Path) -> None:
    found = open_source(twelve.root, on_bad="list", cache_dir=tmp_path)
    assert list(found.paths) == ["a/7.tif"]  # its first frame
