"""The contact sheet shows every picture, pixel for pixel."""

import numpy as np

from tandemrt.bench.contact_sheet import ENLARGED, RIGHT, WRONG, SheetColumn, contact_sheet
from tandemrt.bench.shapes.scenes import render, scenes


def make_sheet(right=(True, False)):
    drawn = scenes(0, 4, "held_out")
    pictures = [render(scene) for scene in drawn]
    columns = [
        SheetColumn("25/0", ("large", "5 ms"), tuple(pictures[:2]), right),
        SheetColumn("0/25", ("small", "2 ms"), tuple(pictures[2:]), right),
    ]
    return pictures, np.asarray(contact_sheet("Title", "below it", [scene.caption for scene in drawn[:2]], columns))


def found_at(sheet, picture):
    """Where a picture, enlarged without smoothing, lies in the sheet; the corner with the mark is left out."""
    enlarged = picture.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    upper = enlarged[: enlarged.shape[0] - 30]
    height, width = upper.shape[:2]
    firsts = np.argwhere((sheet == upper[0, 0]).all(axis=-1))
    return [(int(y), int(x)) for y, x in firsts if np.array_equal(sheet[y : y + height, x : x + width], upper)]


def test_every_picture_is_there_once_enlarged_with_crisp_pixels():
    pictures, sheet = make_sheet()
    places = [found_at(sheet, picture) for picture in pictures]
    assert [len(place) for place in places] == [1, 1, 1, 1]
    (first,), (below,), (beside,), _ = places
    assert below[1] == first[1]
    assert below[0] > first[0]
    assert beside[0] == first[0]
    assert beside[1] > first[1]


def test_marks_tell_right_from_wrong():
    _, mixed = make_sheet()
    _, wrong = make_sheet(right=(False, False))
    assert count_of(mixed, RIGHT) == count_of(mixed, WRONG) > 0
    assert count_of(wrong, RIGHT) == 0


def test_a_label_is_written_beside_its_row():
    pictures, sheet = make_sheet()
    ((y, x),) = found_at(sheet, pictures[0])
    margin = sheet[y : y + 64 * ENLARGED, : x - 2]
    assert margin.min() < 100


def count_of(sheet, color):
    # The stroke inside a mark differs between right and wrong; its disc's rim does not.
    return int((sheet == color).all(axis=-1).any(axis=1).sum())
