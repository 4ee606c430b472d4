"""Files of prompts, and keeping two of them apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tandemrt.calibrate.prompts import chosen_prompts, held_out_prompts, prompts_sha256, read_prompts, require_apart
from tandemrt.runtime.errors import ArgumentError


def written(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_has_one_a_line_and_each_once(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffa red circle \r\n\r\n  A  RED circle\nein blauer Würfel\na, b\n")
    assert read_prompts(path) == ("a red circle", "ein blauer Würfel", "a, b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coco.csv", 'image_id,id,caption\n1,7,"a dog, running"\n2,8,\n\n3,9,"a ""big""\ncat"\n4,10,A dog\n'),
        (
            "coco.tsv",
            'image_id\tid\tCaption \n1\t7\ta dog, running\n3\t9\ta "big" cat\n4\t10\tA dog\n'.replace('"', ""),
        ),
    ],
)
def test_a_table_has_a_column_of_them(tmp_path: Path, name: str, content: str) -> None:
    first, second, third = read_prompts(written(tmp_path, content, name))
    assert (first, second.replace('"', ""), third) == ("a dog, running", "a big cat", "A dog")


def test_the_column_can_be_named_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = written(tmp_path, "caption,said\none,two\n", "list.txt")
    assert read_prompts(path, "said") == ("two",)
    assert read_prompts(path) == ("caption,said", "one,two")


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("p.txt", "\n  \n", None, "p.txt: holds no prompt, expected one a line."),
        ("p.csv", "caption\n\n", None, "p.csv: holds no prompt, expected one a row below the columns' names."),
        ("p.txt", b"ok\nW\xfcrfel", None, "p.txt: not UTF-8 at line 2, byte 4, got b'\\xfcrfe', expected UTF-8 text."),
        ("p.txt", "ok\na\0b", None, "p.txt, line 2: holds NUL, expected text without it."),
        ("p.txt", "ok\n" + "x" * 70_000, None, "line 2: a prompt that is too long, got 70000, expected at most 65536"),
        (
            "p.csv",
            "id,words\n1,a\n",
            None,
            "line 1: columns, got 'id, words', expected a column caption, prompt or text",
        ),
        ("p.csv", "id,words\n1,a\n", "word", "expected a column 'word'. Did you mean 'words'?"),
        ("p.csv", "id,caption\n1,a\n2\n", None, "p.csv, line 3: row, got ['2'], expected 'caption', column 2."),
        ("p.csv", 'id,caption\n1,"a" b\n', None, "p.csv, line 2: not a table ("),
        ("p.csv", "", None, "p.csv, line 1: columns, got '', expected"),
    ],
)
def test_a_file_that_is_not_of_prompts(
    tmp_path: Path, name: str, content: str | bytes, column: str | None, words: str
) -> None:
    with pytest.raises(ArgumentError) as failed:
        read_prompts(written(tmp_path, content, name), column)
    assert words in str(failed.value)
    assert str(failed.value).startswith(str(tmp_path))


def test_repeats_count_where_each_prompt_stands_for_a_picture(tmp_path: Path) -> None:
    path = written(tmp_path, "red\n\nblue\nRED\nred\n", "p.txt")
    assert read_prompts(path, repeats=True) == ("red", "blue", "RED", "red")
    assert read_prompts(path) == ("red", "blue")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"none\.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")


def test_held_out_prompts_are_kept_apart_in_whatever_case_and_space() -> None:
    require_apart(["a red circle"], ["a red circles", "red circle"])
    with pytest.raises(ArgumentError, match="held out and calibrated with: 2 of them, the first is 'A red  circle'"):
        require_apart(["x", "A red  circle", "y"], ["a  RED circle", "Y", "z"])


def test_the_first_prompts_are_chosen(tmp_path: Path) -> None:
    path = written(tmp_path, "red\nblue\nRED\ngreen\n", "prompts.txt")
    assert chosen_prompts(path, None, 2, 64) == ("red", "blue")
    assert chosen_prompts(path, None, None, 2) == ("red", "blue")
    assert chosen_prompts(path, None, None, 64) == chosen_prompts(path, None, None, None) == ("red", "blue", "green")
    with pytest.raises(ArgumentError, match=r"prompts, got 3, expected -n 4\. Give -n 3, or more prompts"):
        chosen_prompts(path, None, 4, 2)


def test_what_is_held_out_is_of_the_prompts_that_are_chosen(tmp_path: Path) -> None:
    """A column holds for both files where they are of one kind."""
    path = written(tmp_path, "said,text\nred,x\nblue,y\n", "prompts.csv")
    for name, content in (("held.csv", "text,said\nz,BLUE\n"), ("held.txt", "Blue\n")):
        held_out = written(tmp_path, content, name)
        assert chosen_prompts(path, "said", 1, 64, held_out) == ("red",)
        with pytest.raises(ArgumentError, match="1 of them, the first is 'blue'"):
            chosen_prompts(path, "said", None, 64, held_out)
    assert held_out_prompts(tmp_path / "held.csv", path, "said") == ("BLUE",)
    with pytest.raises(ArgumentError, match=r"prompts, got 1, expected --judge 2"):
        held_out_prompts(tmp_path / "held.csv", path, "said", 2)


def test_the_digest_of_prompts_is_that_of_a_file_of_them() -> None:
    assert prompts_sha256(["red", "blau ü"]) == hashlib.sha256("red\nblau ü\n".encode()).hexdigest()
    assert prompts_sha256(["red", "blue"]) != prompts_sha256(["red\nblue", ""])
