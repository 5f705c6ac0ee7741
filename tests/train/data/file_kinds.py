"""One picture in every guise that has a meaning as RGB, each with who decodes it where DALI is the loader."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, features

from sdmp_train.data.images import SUFFIXES

WIDTH, HEIGHT = 48, 36

Save = Callable[[Path], object]


def smooth_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft colour gradients: resampling and blurring differ little between libraries, as on photographs."""
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def oriented(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = tag
    return exif


def edited(save: Save, edit: Callable[[bytes], bytes]) -> Save:
    """Save, then change the bytes."""

    def write(path: Path) -> None:
        save(path)
        path.write_bytes(edit(path.read_bytes()))

    return write


def several() -> dict[str, object]:
    """Options for a second frame, made anew, since Pillow leaves its encoder's settings on what it saves."""
    return {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "red")]}


def without_segment(marker: int) -> Callable[[bytes], bytes]:
    """A JPEG without its first segment of that kind."""

    def edit(data: bytes) -> bytes:
        at = data.index(bytes([0xFF, marker]))
        return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]

    return edit


def with_chunk(kind: bytes, body: bytes) -> Callable[[bytes], bytes]:
    """A PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return lambda data: data[:33] + chunk + data[33:]


def sampled(factors: int) -> Callable[[bytes], bytes]:
    """A baseline JPEG whose first component claims these sampling factors (4 bits across, 4 bits down)."""

    def edit(data: bytes) -> bytes:
        at = data.index(b"\xff\xc0") + 11
        return data[:at] + bytes([factors]) + data[at + 1 :]

    return edit


def raw_png(colour: int, depth: int, interlaced: bool) -> Save:
    """A PNG of kinds that Pillow does not write: grey (colour 0) or RGB (2) of any depth, also interlaced."""
    samples = 3 if colour == 2 else 1
    values = np.random.default_rng(1).integers(0, 2**depth, (HEIGHT, WIDTH, samples), dtype=np.uint8)
    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    body = b""
    for top, left, down, across in adam7 if interlaced else ((0, 0, 1, 1),):
        for row in values[top::down, left::across].reshape(-1, len(range(left, WIDTH, across)) * samples):
            bits = np.unpackbits(row[:, None], axis=1)[:, 8 - depth :]
            body += b"\0" + np.packbits(bits).tobytes()
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlaced)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return lambda path: path.write_bytes(data)


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def kinds() -> dict[str, tuple[str, Save]]:
    """File name -> (who decodes it under DALI, how it is written)."""
    rgb = smooth_picture(np.random.default_rng(0), WIDTH, HEIGHT)
    grey, fading = rgb.convert("L"), rgb.convert("RGBA")
    fading.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257 + 3)
    cmyk = Image.merge("CMYK", [*rgb.split(), grey])
    lossless = {"lossless": True, "exact": True}

    def save(image: Image.Image, **options: object) -> Save:
        return lambda path: image.copy().save(path, **options)

    jpeg, png = save(rgb), save(rgb)
    found: dict[str, tuple[str, Save]] = {
        "plain.jpg": ("dali", jpeg),
        "plain.jfif": ("dali", save(rgb, format="JPEG")),
        "plain.jpe": ("dali", save(rgb, format="JPEG")),
        "full-chroma.jpg": ("dali", save(rgb, subsampling=0)),
        "half-chroma.jpg": ("dali", save(rgb, subsampling=1)),
        "progressive.jpg": ("dali", save(rgb, progressive=True)),
        "restarts.jpg": ("dali", save(rgb, restart_marker_blocks=2)),
        "optimised.jpg": ("dali", save(rgb, optimize=True, dpi=(300, 72))),
        "turned.jpg": ("dali", save(rgb, exif=oriented(6))),
        "profile.jpg": ("dali", save(rgb, icc_profile=b"no profile" * 9)),
        "grey.jpg": ("dali", save(grey)),
        "png-inside.jpg": ("dali", save(rgb, format="PNG")),
        "trailing.jpg": ("dali", edited(jpeg, lambda data: data + b"more" * 9)),
        "no-jfif.jpg": ("dali", edited(jpeg, without_segment(0xE0))),
        "extended.jpg": ("dali", edited(jpeg, lambda data: data.replace(b"\xff\xc0", b"\xff\xc1", 1))),
        "sampled.jpg": ("pillow", edited(save(grey), sampled(0x22))),
        "rgb.jpg": ("pillow", save(rgb, keep_rgb=True)),
        "rgb-adobe.jpg": ("pillow", edited(jpeg, lambda data: data[:2] + adobe(0) + data[2:])),
        "ycbcr-adobe.jpg": ("dali", edited(jpeg, lambda data: data[:2] + adobe(1) + data[2:])),
        "cmyk.jpg": ("pillow", save(cmyk)),
        "cmyk-no-adobe.jpg": ("pillow", edited(save(cmyk), without_segment(0xEE))),
        "ycck.jpg": ("pillow", edited(save(cmyk), lambda data: data.replace(adobe(0)[4:], adobe(2)[4:], 1))),
        "several.jpg": ("dali", save(rgb, format="MPO", **several())),
        "plain.png": ("dali", png),
        "grey.png": ("dali", save(grey)),
        "alpha.png": ("dali", save(fading)),
        "grey-alpha.png": ("dali", save(rgb.convert("LA"))),
        "palette.png": ("dali", save(palette)),
        "palette-4-bits.png": ("dali", save(rgb.quantize(9), bits=4)),
        "palette-transparent.png": ("dali", save(palette, transparency=3)),
        "transparent.png": ("dali", save(rgb, transparency=rgb.getpixel((3, 3)))),
        "grey-transparent.png": ("dali", save(grey, transparency=grey.getpixel((3, 3)))),
        "black-white.png": ("dali", save(rgb.convert("1"))),
        **{f"grey-{depth}-bits.png": ("dali", raw_png(0, depth, False)) for depth in (1, 2, 4)},
        "interlaced.png": ("dali", raw_png(2, 8, True)),
        "interlaced-grey.png": ("dali", raw_png(0, 8, True)),
        "gamma.png": ("dali", edited(png, with_chunk(b"gAMA", struct.pack(">I", 100_000)))),
        "profile.png": ("dali", save(rgb, icc_profile=b"no profile" * 9)),
        "turned.png": ("pillow", save(rgb, exif=oriented(6))),
        "animated.png": ("pillow", save(rgb, **several())),
        "deep.png": ("pillow", save(deep)),
        "one.png": ("dali", save(rgb.resize((1, 1)))),
        "line.png": ("dali", save(rgb.resize((1, 400)))),
        "lossy.webp": ("dali", save(rgb)),
        "lossy-alpha.webp": ("dali", save(fading, exact=True)),
        "lossless.webp": ("dali", save(rgb, **lossless)),
        "lossless-alpha.webp": ("dali", save(fading, **lossless)),
        "turned.webp": ("pillow", save(rgb, exif=oriented(6))),
        "animated.webp": ("pillow", save(rgb, **several())),
        "plain.bmp": ("pillow", save(rgb)),
        "grey.bmp": ("pillow", save(grey)),
        "alpha.bmp": ("pillow", save(fading)),
        "palette.bmp": ("pillow", save(palette)),
        "black-white.bmp": ("pillow", save(rgb.convert("1"))),
        "plain.dib": ("pillow", save(rgb)),
        "plain.ppm": ("pillow", save(rgb)),
        "grey.pgm": ("pillow", save(grey)),
        "deep.pgm": ("pillow", save(deep)),
        "black-white.pbm": ("pillow", save(rgb.convert("1"))),
        "maxval-99.pgm": ("pillow", lambda path: path.write_bytes(b"P5 48 36 99\n" + bytes(range(48)) * 36)),
        "text.ppm": ("pillow", lambda path: path.write_text("P3 48 36 255\n" + "10 200 30 " * (48 * 36))),
        "plain.tif": ("pillow", save(rgb)),
        "packed.tif": ("pillow", save(rgb, compression="tiff_lzw")),
        "jpeg-inside.tif": ("pillow", save(rgb, compression="jpeg")),
        "fax.tif": ("pillow", save(rgb.convert("1"), compression="group4")),
        "grey.tif": ("pillow", save(grey)),
        "alpha.tif": ("pillow", save(fading)),
        "palette.tif": ("pillow", save(palette)),
        "cmyk.tif": ("pillow", save(cmyk)),
        "ycbcr.tif": ("pillow", save(rgb.convert("YCbCr"))),
        "deep.tif": ("pillow", save(deep)),
        "several.tif": ("pillow", save(rgb, **several())),
        "plain.gif": ("pillow", save(palette)),
        "animated.gif": ("pillow", save(rgb, **several())),
        **{f"turned-{tag}.tif": ("pillow", save(rgb, exif=oriented(tag))) for tag in range(1, 9)},
        **{
            f"turned-{tag}.lzw.tif": ("pillow", save(rgb, exif=oriented(tag), compression="tiff_lzw")) for tag in (2, 6)
        },
    }
    if ".avif" in SUFFIXES:
        found["plain.avif"] = ("pillow", save(rgb))
        found["turned.avif"] = ("pillow", save(rgb, exif=oriented(6)))
    if features.check("jpg_2000"):
        found["plain.jp2"] = ("pillow", save(rgb))
        found["grey.j2k"] = ("pillow", save(grey))
    return found
