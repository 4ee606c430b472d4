"""What sections of a report say besides figures."""

from __future__ import annotations

from tandemrt.bench.contenders import Answer
from tandemrt.bench.rounds import Taken
from tandemrt.bench.sections import contenders_section, otherwise, variants_section


def taken(otherwise_told: str = "", **ran: str) -> Taken:
    """Of a contender that told this when it was opened, and what its models ran on after its only round."""
    told = {"runs": "Python 3", "device": "cpu", "otherwise": otherwise_told}
    return Taken(opened=Answer({}, told), rounds=[Answer({"total_s": 1.0}, ran)])


def converted() -> Taken:
    return Taken(opened=Answer({}, {"models": "files converted from the graphs beforehand, uncounted"}))


def test_what_any_contender_does_otherwise_is_told_once_with_all_who_do() -> None:
    failed = taken("DDIM in place of DEISMultistep")
    failed.rounds.clear()
    every = {
        "ours": taken(unet="graph, an engine is damaged", guided="9 of 9, as asked", text_encoder="graph"),
        "a": taken("DDIM in place of DEISMultistep"),
        "b": taken("Euler in place of DEISMultistep"),
        "c": taken("DDIM in place of DEISMultistep"),
        "d": failed,
        "one of the same process": Taken(rounds=[Answer({}, {})]),
    }
    assert list(otherwise(every)) == [
        "ours: unet ran on graph: an engine is damaged",
        "a, c: DDIM in place of DEISMultistep",
        "b: Euler in place of DEISMultistep",
    ]


def test_ways_are_told_over_all_rounds() -> None:
    figures = dict.fromkeys(("total_s", "text_s", "decode_s", "host_s", "peak_mib"), 1.0) | {"total_s": 3.0}
    rounds = [Answer(figures, {"guided": f"{rows} of 22", "window": "rows 15 to 20"}) for rows in (9, 22, 10)]
    ways = {"batched": taken(), "adaptive": Taken(rounds=rounds, psnr_db=[40.0, 200.0, 32.0])}
    ways["batched"].rounds[:] = rounds
    row = variants_section("cfg", "Guidance", ways, "").rows[1]
    assert row.words == {"guided": "9 of 22 to 22 of 22", "window": "rows 15 to 20"}
    assert row.figures["psnr"].spread == (32.0, 40.0, 200.0)


def test_what_ran_is_told_with_its_device() -> None:
    assert [column.of for column in contenders_section({"a": converted()}).columns] == ["models"]
    section = contenders_section({"ours": taken(), "peer": Taken(failed="no")})
    assert [column.title for column in section.columns] == ["versions", "device"]
    assert section.rows[0].words["device"] == "cpu"
