"""Pictures that are damaged, huge, odd or hostile: each gives pixels or one line."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chatglm.pictures import MOST_BYTES, PictureError, pixels_of, read_base64, read_picture
from chatglm.pictures.fetching import public_address
from conftest import SHARED, needs_shared
from deviations import DEVIATIONS
from tiny_visualglm import picture_bytes

FOLDER = SHARED / "goldens" / "tokenizer"


@needs_shared
def test_pixels_are_those_of_the_original() -> None:
    described = json.loads((FOLDER / "visualglm.json").read_text(encoding="utf-8"))["images"]["files"]
    pixels = load_file(FOLDER / "visualglm_pixels.safetensors")
    for name, golden in described.items():
        ours = pixels_of(read_picture(FOLDER / "visualglm_images" / name), 224)
        assert hashlib.sha256(ours[0].numpy().tobytes()).hexdigest() == golden["pixels_sha256"], name
        assert torch.equal(ours[0, :, ::7, ::7], pixels[f"{name}.every_7th"])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", more: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    images = [Image.new("RGB", (8, 8), (30 * index, 0, 0)) for index in range(frames)]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = picture_bytes()
JPEG = picture_bytes(kind="JPEG")
BAD: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no picture",
    "html": b"<html><body>404</body></html>",
    "half of a png": RED[: len(RED) // 2],
    "half of a jpeg": JPEG[: len(JPEG) // 2],
    "head of a jpeg": JPEG[:20],
    "head of a gif": gif(2)[:15],
    "png with a wrong checksum": RED[:40] + b"\0\0\0\0" + RED[44:],
    "png without pixels": png(4, 4),
    "no width": png(0, 7),
    "no height": png(7, 0),
    "a billion pixels": png(40_000, 30_000),
    "unpacks to gigabytes": png(7000, 7200, b"\0" * 1000),
    "text that unpacks to 100 MB": png(2, 2, b"\0" * 14, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**8))),
    "more bytes than allowed": RED + b"\0" * MOST_BYTES,
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "floating point": saved(Image.new("F", (4, 4), 0.5), "TIFF"),
    "truncated webp": picture_bytes(kind="WEBP")[:30],
    "bmp of a lie": b"BM" + struct.pack("<IHHIIiiHH", 70, 0, 0, 54, 40, 100_000, 100_000, 1, 24) + b"\0" * 40,
}
GOOD: dict[str, bytes] = {
    "png": RED,
    "jpeg": JPEG,
    "cmyk": saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"),
    "animated gif": gif(5),
    "16 bits": saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
    "1 bit": saved(Image.new("1", (9, 9), 1), "PNG"),
    "palette with transparency": saved(Image.new("P", (9, 9), 3), "PNG", transparency=3),
    "webp": picture_bytes(kind="WEBP"),
    "tiff": picture_bytes(kind="TIFF"),
    "one pixel": picture_bytes(size=(1, 1)),
    "a line": picture_bytes(size=(3000, 1)),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_for_what_cannot_be_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(BAD[name])
    for source in (BAD[name], path):
        with pytest.raises(PictureError) as caught:
            read_picture(source)
        assert "\n" not in str(caught.value) and 10 < len(str(caught.value)) < 300
    if len(BAD[name]) < 2**20:
        with pytest.raises(PictureError):
            read_base64(base64.b64encode(BAD[name]).decode())


@pytest.mark.parametrize("name", GOOD)
def test_pixels_of_odd_pictures(name: str) -> None:
    image = read_picture(GOOD[name])
    assert image.mode == "RGB"
    pixels = pixels_of(image, 28)
    assert pixels.shape == (1, 3, 28, 28) and bool(torch.isfinite(pixels).all())


def test_deep_and_turned_pictures() -> None:
    assert DEVIATIONS["pictures_stand_upright"]
    grey = read_picture(GOOD["16 bits"]).getpixel((0, 0))
    assert grey == (156, 156, 156)  # 40000 / 257
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = read_picture(saved(Image.new("RGB", (30, 10)), "JPEG", exif=exif))
    assert turned.size == (10, 30)


def test_paths_and_sources(tmp_path: Path) -> None:
    odd = {tmp_path: "folder", tmp_path / "no.png": "no picture", "a" * 5000: "a…", "\0": "cannot be read"}
    for source, words in odd.items():
        with pytest.raises(PictureError, match=words):
            read_picture(source)
    with pytest.raises(TypeError, match="not int"):
        read_picture(7)
    image = Image.new("RGBA", (5, 5), (1, 2, 3, 0))
    assert read_picture(image).getpixel((0, 0)) == (1, 2, 3) and image.mode == "RGBA"
    assert read_picture(io.BytesIO(RED)).size == (20, 30)


def test_base64() -> None:
    text = base64.b64encode(RED).decode()
    for form in (text, f"data:image/png;base64,{text}", "\n".join([text[:50], text[50:]])):
        assert read_base64(form).size == (20, 30)
    assert read_picture(f"data:image/png;base64,{text}").size == (20, 30)
    for bad in ("", "****", f"data:image/png,{text}", "data:text/html;base64,PGI+", f"http://x/{text},{text}"):
        with pytest.raises(PictureError):
            read_base64(bad)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://localhost:8000/a.png", "http://[::1]/a.png", "http://10.0.0.3/a.png",
        "http://169.254.169.254/latest/meta-data", "http://192.168.1.1/", "http://0.0.0.0/", "http://[::ffff:127.0.0.1]/",
        "http://100.64.0.1/x", "http://2130706433/", "ftp://example.com/a.png", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_private_addresses_are_not_fetched(url: str) -> None:
    assert DEVIATIONS["addresses_are_fetched_on_request"]
    with pytest.raises(PictureError, match="allow_urls"):
        read_picture(url)
    with pytest.raises(PictureError):
        read_picture(url, allow_urls=True)


def test_a_public_address_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, port: int, **options: Any) -> list[Any]:
        addresses = {"public": ["93.184.216.34"], "both": ["93.184.216.34", "127.0.0.1"]}[host]
        return [(2, 1, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("socket.getaddrinfo", found)
    assert public_address("public", 80) == "93.184.216.34"
    with pytest.raises(PictureError, match="private"):
        public_address("both", 80)
