"""One image as pixels from 0 to 1: numbers in the row itself, a picture that the dataset holds, or a file beside it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.runtime.errors import UserError


def open_image(content: Any, place: str, folder: Path) -> Tensor:
    """The pixels of one image, float32 [C, H, W], from 0 to 1.

    `content` is rows of pixels ([H][W], or [C][H][W]; whole numbers from 0 to 255, others from 0 to 1), a picture, its
    bytes, or the path of its file, which counts from `folder`.

    Raises:
        UserError: the content is none of these, or the picture cannot be read; with `place`.
    """
    if isinstance(content, list):
        return _pixels_of_numbers(content, place)
    file = _file_of(content, folder)
    picture = content if file is None else _read_picture(file, place)
    pillow = sys.modules.get("PIL.Image")  # before it is imported, nothing can be a picture
    if pillow is None or not isinstance(picture, pillow.Image):
        raise UserError(f"{place}: neither rows of pixels nor a picture: {str(content)[:80]}")
    picture = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    return values.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()


@contextmanager
def pillow_needed(place: str) -> Iterator[None]:
    """Say what to install where a picture is read inside, by whatever library, and pillow is not there.

    Raises:
        UserError: pillow is not installed.
    """
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("PIL") and "Pillow" not in str(error):
            raise
        raise UserError(
            f"{place}: pictures are read with pillow, which is not installed: pip install 'cascade-distill[images]'; "
            "rows of pixels need none"
        ) from error


def _file_of(content: Any, folder: Path) -> BytesIO | Path | None:
    """Where a picture's bytes are; None where the content is neither bytes nor a path."""
    if isinstance(content, dict) and isinstance(content.get("bytes"), bytes):  # how Parquet files hold pictures
        return BytesIO(content["bytes"])
    if isinstance(content, dict) and isinstance(content.get("path"), str):
        content = content["path"]
    if not isinstance(content, str):
        return None
    path = Path(content).expanduser()
    return path if path.is_absolute() else folder / path


def _read_picture(file: BytesIO | Path, place: str) -> Any:
    """A picture with its pixels loaded."""
    with pillow_needed(place):
        from PIL import Image, UnidentifiedImageError
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        name = f"{file}: " if isinstance(file, Path) else ""
        raise UserError(f"{place}: {name}no picture that can be read: {error}") from error
    return picture


def _pixels_of_numbers(content: list[Any], place: str) -> Tensor:
    """Float32 [C, H, W] from 0 to 1 of nested lists of numbers."""
    try:
        numbers = torch.tensor(content)
    except (ValueError, TypeError) as error:
        raise UserError(f"{place}: rows of pixels of different length, or no numbers: {error}") from error
    whole, pixels = not numbers.is_floating_point(), numbers.float()
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or not pixels.numel():
        raise UserError(f"{place}: expected pixels as [height][width] or [channels][height][width]")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > (255 if whole else 1):
        raise UserError(
            f"{place}: pixels from {low:g} to {high:g}; expected whole numbers to 255, or others from 0 to 1"
        )
    return pixels / 255 if whole else pixels
