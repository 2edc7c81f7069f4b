"""Reads a picture that may be damaged or hostile: every fault is one line, a `PictureError`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageOps, UnidentifiedImageError

#: Limits of a picture: bytes of its file, and pixels once it is unpacked.
MOST_BYTES, MOST_PIXELS = 20 * 2**20, 50_000_000
#: Formats with decoders of Pillow's own. Others call further programs, or are rarely fuzzed.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]{1,20}:")


class PictureError(ValueError):
    """A picture cannot be read; the message is one line."""


def read_picture(source: Any, allow_urls: bool = False) -> Image.Image:
    """A picture in RGB, upright as its EXIF data says; of several frames, the first.

    Transparency is dropped, as in the original. Sixteen bits a channel are scaled to eight.

    Args:
        source: a path, the bytes of a file, an open binary file, a PIL image, or the URL of a picture: `data:` with
            base64, and `http:` or `https:` with `allow_urls`, but never an address in a private network.
        allow_urls: fetch pictures from the network.

    Raises:
        PictureError: it is missing, damaged, too large, of another format, or must not be fetched.
        TypeError: `source` is something else.
    """
    if isinstance(source, Image.Image):
        check_size(*source.size)
        return _unpacked(source.copy(), "the picture")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode(bytes(source))
    if isinstance(source, str) and _URL.match(source) and not Path(source).exists():
        return _from_url(source, allow_urls)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source).expanduser())
    if hasattr(source, "read"):
        return decode(source.read(MOST_BYTES + 1))
    raise TypeError(f"a picture is a path, bytes, a file or a PIL image, not {type(source).__name__}")


def read_base64(text: str) -> Image.Image:
    """The picture in a base64 text, with or without `data:image/png;base64,` in front. Raises PictureError."""
    head, comma, body = text.partition(",")
    if comma and not re.fullmatch(r"data:[\w.+/-]*(;[\w.+=/-]+)*;base64", head.strip(), re.IGNORECASE):
        raise PictureError("a data URL of a picture looks like data:image/png;base64,iVBORw0…")
    if len(body or head) > MOST_BYTES * 4 // 3 + 4096:
        raise PictureError(_too_many_bytes("the picture"))
    try:
        data = base64.b64decode("".join((body if comma else head).split()), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("the picture is not valid base64") from None
    return decode(data)


def _from_url(url: str, allow_urls: bool) -> Image.Image:
    if url[:5].lower() == "data:":
        return read_base64(url)
    if not allow_urls:
        raise PictureError(f"{_short(url)} is an address: give a file, or allow_urls=True to have it fetched")
    from .fetching import fetch

    return decode(fetch(url, MOST_BYTES), _short(url))


def _from_file(path: Path) -> Image.Image:
    try:
        if path.is_dir():
            raise PictureError(f"{path} is a folder, not a picture")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise PictureError(f"there is no picture {_short(str(path))}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{_short(str(path))} cannot be read: {reason}") from None
    return decode(data, path.name)


def decode(data: bytes, name: str = "the picture") -> Image.Image:
    """The picture in the bytes of a file, as `read_picture` gives it. Raises PictureError, which calls it `name`."""
    if len(data) > MOST_BYTES:
        raise PictureError(_too_many_bytes(name))
    if not data:
        raise PictureError(f"{name} is an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large pictures (we have a limit), odd EXIF data
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(*image.size, name)
                image.load()
                return _unpacked(image, name)
    except PictureError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise PictureError(f"{name} is damaged, or no picture of a known format ({kinds})") from None
    except Image.DecompressionBombError:
        raise PictureError(_too_many_pixels(name)) from None
    except MemoryError:
        raise PictureError(f"{name} needs more memory than there is") from None
    except Exception as error:  # whatever a decoder makes of damaged data: struct.error, SyntaxError, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PictureError(f"{name} is damaged: {reason[:200]}") from None


def check_size(width: int, height: int, name: str = "the picture") -> None:
    """Raises PictureError for a picture without pixels, or with too many."""
    if width < 1 or height < 1:
        raise PictureError(f"{name} has no pixels ({width} x {height})")
    if width * height > MOST_PIXELS:
        raise PictureError(f"{_too_many_pixels(name)} ({width} x {height})")


def _unpacked(image: Image.Image, name: str) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF data say nothing about the pixels
        image = ImageOps.exif_transpose(image) or image
    if image.mode.startswith("I;16") or image.mode == "I":
        low, high = cast("tuple[float, float]", image.getextrema())
        scale = 1 / 257 if high > 255 else 1.0  # 16 bits to 8
        if low < 0 or high > 65535:
            raise PictureError(f"{name} has more than 16 bits a channel")
        image = image.convert("F").point(lambda value: value * scale + 0.5).convert("L")
    elif image.mode == "F":
        raise PictureError(f"{name} holds floating-point numbers: save it with 8 bits a channel")
    return image.convert("RGB")


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}…"


def _too_many_bytes(name: str) -> str:
    return f"{name} has more than {MOST_BYTES // 2**20} MB: make it smaller"


def _too_many_pixels(name: str) -> str:
    return f"{name} has more than {MOST_PIXELS // 1_000_000} million pixels: make it smaller"
