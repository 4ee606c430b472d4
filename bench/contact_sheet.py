"""A contact sheet: one row a prompt, one column a way to paint it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

ENLARGED = 3
MARGIN, GAP = 36, 20
LABEL_WIDTH = 250
TITLE_HEIGHT, HEAD_HEIGHT, FOOT_HEIGHT = 76, 84, 34

PAPER, INK, FAINT, LINE = (252, 251, 248), (28, 30, 34), (112, 116, 124), (214, 212, 206)
RIGHT, WRONG = (24, 128, 72), (190, 44, 44)

Pixels = npt.NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class SheetColumn:
    """A heading, the lines under it, and for each row the picture (H, W, 3) uint8 with whether it is right."""

    heading: str
    details: tuple[str, ...]
    pictures: tuple[Pixels, ...]
    right: tuple[bool, ...]


def contact_sheet(title: str, subtitle: str, labels: Sequence[str], columns: Sequence[SheetColumn]) -> Image.Image:
    """Lay the pictures out, three times as large with crisp pixels; a mark in each says whether it is right."""
    cell = columns[0].pictures[0].shape[0] * ENLARGED
    pitch = cell + GAP
    width = 2 * MARGIN + LABEL_WIDTH + len(columns) * pitch
    top = MARGIN + TITLE_HEIGHT + HEAD_HEIGHT
    sheet = Image.new("RGB", (width, top + len(labels) * pitch + FOOT_HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, INK, _font(32))
    draw.text((MARGIN, MARGIN + 34), subtitle, FAINT, _font(17))
    for index, column in enumerate(columns):
        left = MARGIN + LABEL_WIDTH + GAP + index * pitch
        _draw_heading(draw, column, left, MARGIN + TITLE_HEIGHT)
        for row, picture in enumerate(column.pictures):
            _paste_picture(sheet, draw, picture, column.right[row], (left, top + row * pitch))
    for row, label in enumerate(labels):
        lines = _wrapped(draw, label, _font(19), LABEL_WIDTH)
        middle = top + row * pitch + cell / 2
        draw.multiline_text((MARGIN, middle), "\n".join(lines), INK, _font(19), anchor="lm", spacing=7)
    foot = top + len(labels) * pitch + FOOT_HEIGHT / 2 - 8
    legend = "in the corner: what the checker says, all attributes right or not"
    draw.text((width - MARGIN, foot), legend, FAINT, _font(14), anchor="rm")
    return sheet


def _draw_heading(draw: ImageDraw.ImageDraw, column: SheetColumn, left: int, top: int) -> None:
    draw.text((left, top), column.heading, INK, _font(25))
    for line, text in enumerate(column.details):
        draw.text((left, top + 32 + 20 * line), text, FAINT, _font(15))


def _paste_picture(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Pixels, right: bool, corner: tuple[int, int]
) -> None:
    """The enlarged picture with a hairline around it and a mark in its lower right corner, not by color alone."""
    image = Image.fromarray(picture)
    image = image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
    sheet.paste(image, corner)
    x, y = corner
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=LINE)
    cx, cy = x + image.width - 14, y + image.height - 14
    draw.ellipse((cx - 10, cy - 10, cx + 10, cy + 10), fill=RIGHT if right else WRONG, outline=PAPER, width=2)
    if right:
        draw.line([(cx - 4, cy), (cx - 1, cy + 4), (cx + 5, cy - 4)], fill=PAPER, width=2)
    else:
        draw.line([(cx - 4, cy - 4), (cx + 4, cy + 4)], fill=PAPER, width=2)
        draw.line([(cx - 4, cy + 4), (cx + 4, cy - 4)], fill=PAPER, width=2)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> Font:
    return ImageFont.load_default(size)
