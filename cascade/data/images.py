"""One image as pixels from 0 to 1: numbers in the row itself, a picture that the dataset holds, or a file beside it."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.runtime.errors import UserError


def open_image(content: Any, place: str, folder: Path) -> Tensor:
    """float32 [C, H, W].

    Numbers are rows of pixels ([H][W], or [C][H][W]): whole ones from 0 to 255, others from 0 to 1.

    Raises:
        UserError: it is none of these, or the file cannot be read; `place` is named.
    """
    if isinstance(content, list):
        return _numbers(content, place)
    from PIL import Image, UnidentifiedImageError

    if isinstance(content, dict) and isinstance(content.get("bytes"), bytes):  # how Parquet files hold pictures
        content = BytesIO(content["bytes"])
    elif isinstance(content, dict) and isinstance(content.get("path"), str):
        content = content["path"]
    if isinstance(content, BytesIO):
        try:
            content = Image.open(content)
            content.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(f"{place}: no picture that can be read: {error}") from error
    if isinstance(content, str):
        path = Path(content).expanduser()
        path = path if path.is_absolute() else folder / path
        try:
            content = Image.open(path)
            content.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(f"{place}: {path}: no picture that can be read: {error}") from error
    if not isinstance(content, Image.Image):
        raise UserError(f"{place}: neither rows of pixels nor a picture: {str(content)[:80]}")
    picture = content if content.mode in ("L", "RGB") else content.convert("RGB")
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    return values.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()


def _numbers(content: list[Any], place: str) -> Tensor:
    try:
        pixels = torch.tensor(content)
    except (ValueError, TypeError) as error:
        raise UserError(f"{place}: rows of pixels of different length, or no numbers: {error}") from error
    whole, values = not pixels.is_floating_point(), pixels.float()
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.numel():
        raise UserError(f"{place}: expected pixels as [height][width] or [channels][height][width]")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > (255 if whole else 1):
        raise UserError(
            f"{place}: pixels from {low:g} to {high:g}; expected whole numbers to 255, or others from 0 to 1"
        )
    return values / 255 if whole else values
