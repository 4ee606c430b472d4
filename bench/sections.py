"""What entrants took, as sections of a report: whole pictures, their parts, the start, the models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from tandemrt.runtime.bundle import Bundle

from .picture_limits import PictureLimits
from .probes import GPU_MIB
from .reports.schema import Column, Figure, Plot, Row, Section, Subject
from .rounds import MOST_DB, Taken
from .seen import seen_columns, seen_figures, seen_note
from .sizes import stored_bytes

# What is told of a way besides figures.
_WORDS = {"guided": "rows with both branches", "window": "window"}


def pictures_section(taken: Mapping[str, Taken], pictures: int, limits: Mapping[str, PictureLimits]) -> Section:
    """Whole pictures, from the text to the pixels. pictures: how many a call paints. limits: by contender."""
    first = next(iter(taken))
    measured = [_row(name, one, _picture_figures(one, pictures)) for name, one in taken.items()]
    rows = _with_rates(measured, taken, pictures, limits)
    rates = (Column(of="limit", title="of products in fp32"),) if limits else ()
    return Section(
        key="pictures",
        title="Whole pictures",
        baseline=first,
        columns=(
            Column(of="total", title="s a call", shown="percentiles"),
            Column(of="rate", title="images/s"),
            Column(of="total", title=f"times {first}", shown="ratio"),
            Column(of="peak", title="peak memory, MiB"),
            *seen_columns(rows),
            *rates,
            Column(of="psnr", title="PSNR to the first, dB"),
        ),
        rows=tuple(rows),
        plots=(Plot(title="Seconds a call; a dot is a round", y="total"),),
        note="From the prompt to the picture's pixels. Every contender paints the same prompts from the same seeds in "
        f"turns; the peak is of resident memory, in which mapped files count.{seen_note(rows)}"
        + (_RATES_NOTE if limits else ""),
    )


def variants_section(key: str, title: str, taken: Mapping[str, Taken], note: str) -> Section:
    """Whole pictures of one process in several ways, beside the first of these."""
    first = next(iter(taken))
    told = {word for one in taken.values() for word in _words(one)}
    rows = tuple(_row(name, one, _variant_figures(one)) for name, one in taken.items())
    return Section(
        key=key,
        title=title,
        baseline=first,
        columns=(
            Column(of="total", title="s a picture", shown="percentiles"),
            Column(of="denoise", title="of it the rows, s"),
            Column(of="host", title="of these not the model"),
            Column(of="total", title=f"times {first}", shown="ratio"),
            *seen_columns(rows),
            Column(of="psnr", title=f"PSNR to {first}, dB"),
            *(Column(of=word, title=title, shown="words") for word, title in _WORDS.items() if word in told),
        ),
        rows=rows,
        plots=(Plot(title="Seconds a picture; a dot is a round", y="total"),),
        note=f"{note} {MOST_DB:g} dB is the same picture.{seen_note(rows)}",
    )


def start_section(taken: Mapping[str, Taken]) -> Section:
    """From an interpreter's start to its first picture."""
    rows = []
    for name, one in taken.items():
        figures = {}
        if one.opened is not None and one.first is not None:
            opened, first = one.opened.figures["open_s"], one.first.figures["total_s"]
            figures = {
                "open": Figure(unit="s", samples=(opened,)),
                "first": Figure(unit="s", samples=(opened + first,)),
            }
        rows.append(_row(name, one, figures))
    return Section(
        key="start",
        title="Start",
        columns=(
            Column(of="open", title="s until opened"),
            Column(of="first", title="s until the first picture"),
        ),
        rows=tuple(rows),
        note="Of a fresh interpreter, once, with the files in the system's memory or not, as it came; TandemRT loads a "
        "model when it is first needed. `bench cold` repeats it.",
    )


def contenders_section(taken: Mapping[str, Taken]) -> Section:
    """What each contender runs with, as it told when it was opened."""
    columns = {"runs": "versions", "device": "device", "threads": "threads", "precision": "precision"}
    columns |= {"models": "opens", "otherwise": "otherwise than asked"}
    opened = {name: one.opened.words if one.opened is not None else {} for name, one in taken.items()}
    told = {word for words in opened.values() for word, value in words.items() if value}
    return Section(
        key="contenders",
        title="What ran",
        columns=tuple(Column(of=of, title=title, shown="words") for of, title in columns.items() if of in told),
        rows=tuple(Row(name=name, words=opened[name], failed=one.failed) for name, one in taken.items()),
        note="Every contender has an interpreter of its own, and a peer with an environment of its own has packages of "
        "its own. The precision of TandemRT is that of its models and target.",
    )


def cold_section(taken: Mapping[str, Taken]) -> Section:
    """Fresh starts: until the models are open, until the first picture."""
    first = next(iter(taken))
    rows = []
    for name, one in taken.items():
        figures = {}
        if one.rounds:
            until = zip(one.samples("open_s"), one.samples("total_s"), strict=True)
            figures = {
                "open": Figure(unit="s", samples=one.samples("open_s")),
                "first": Figure(unit="s", samples=tuple(map(sum, until))),
                "peak": Figure(unit="MiB", samples=one.samples("peak_mib")),
                "import": Figure(unit="s", samples=one.samples("import_s")),
                "import_peak": Figure(unit="MiB", samples=one.samples("import_peak_mib")),
                **seen_figures(one),
            }
        rows.append(_row(name, one, figures))
    return Section(
        key="cold",
        title="From a fresh start",
        baseline=first,
        columns=(
            Column(of="import", title="s until imported"),
            Column(of="import_peak", title="peak memory then, MiB"),
            Column(of="open", title="s until opened"),
            Column(of="first", title="s until the first picture", shown="percentiles"),
            Column(of="first", title=f"times {first}", shown="ratio"),
            Column(of="peak", title="peak memory, MiB"),
            *seen_columns(rows),
        ),
        rows=tuple(rows),
        plots=(Plot(title="Seconds until the first picture; a dot is a start", y="first"),),
        note="Of a fresh interpreter each, imports and the loading of models among it, with the files in the system's "
        "memory after the rounds that go before. TandemRT loads a model when it is first needed, so that the first "
        f"picture is what to compare.{seen_note(rows)}",
    )


def models_section(bundle: Bundle, taken: Mapping[str, Taken]) -> Section:
    """The bundle's models, what they ran on, and how large that is."""
    rows = []
    for name, component in bundle.manifest.components.items():
        words = {"precision": component.computes_in}
        figures = {"file": Figure(unit="MB", samples=(file_mb(bundle, name),))}
        for contender, one in taken.items():
            if one.rounds and name in one.rounds[-1].words:
                words[contender] = one.rounds[-1].words[name]
                figures[contender] = Figure(unit="MB", samples=(one.rounds[-1].figures[f"{name}_mb"],))
        if len(words) > 1:
            rows.append(Row(name=name, words=words, figures=figures))
    ran = [name for name in taken if any(name in row.words for row in rows)]
    return Section(
        key="models",
        title="Models",
        columns=(
            Column(of="precision", title="precision", shown="words"),
            Column(of="file", title="files, MB"),
            *(column for name in ran for column in _ran_columns(name)),
        ),
        rows=tuple(rows),
        note="The precision is the graph's; a target may compute in another, which it names. A model runs on the "
        "bundle's files, or on engines that were made of them.",
    )


def _ran_columns(contender: str) -> tuple[Column, Column]:
    return Column(of=contender, title=contender, shown="words"), Column(of=contender, title="that, MB")


def otherwise(taken: Mapping[str, Taken]) -> Iterator[str]:
    """What ran otherwise than it was asked to, a sentence each, with all of whom that is said.

    Of peers what they told when they were opened; of TandemRT models that ran on something else than they could have.
    """
    told: dict[str, list[str]] = {}
    for name, one in taken.items():
        differs = one.opened.words.get("otherwise", "") if one.rounds and one.opened is not None else ""
        if differs:
            told.setdefault(differs, []).append(name)
        for component, words in one.rounds[-1].words.items() if one.rounds else ():
            ran, _, reason = words.partition(", ")
            if reason and component not in _WORDS:
                told.setdefault(f"{component} ran on {ran}: {reason}", []).append(name)
    yield from (f"{', '.join(names)}: {what}" for what, names in told.items())


def subject_of(bundle: Bundle, *, random_weights: bool) -> Subject:
    """A bundle as a report names it."""
    sizes = {name: file_mb(bundle, name) for name in bundle.manifest.components}
    return Subject(name=bundle.path.name, digest=bundle.digest, random_weights=random_weights, file_mb=sizes)


def file_mb(bundle: Bundle, name: str) -> float:
    """The size of a model's files."""
    return stored_bytes(bundle, name) / 1e6


def _row(name: str, taken: Taken, figures: Mapping[str, Figure]) -> Row:
    return Row(name=name, words=_words(taken), figures={} if taken.failed else figures, failed=taken.failed)


_RATES_NOTE = (
    " Of products in fp32: the operations of TandemRT's graphs by each contender's time, whatever a peer does instead, "
    "as a share of what such products reach through the backend of TandemRT's first target."
)


def _with_rates(
    rows: list[Row], taken: Mapping[str, Taken], pictures: int, limits: Mapping[str, PictureLimits]
) -> list[Row]:
    """Rows with what the picture's operations came to, by the limits on the first target that has any."""
    first = next((name for name in limits if taken[name].rounds), None)
    if first is None:
        return rows
    flops = limits[first].flops(taken[first].rounds[-1].figures, pictures)
    peak = limits[first].rates.flops["fp32"]
    return [_with_rate(row, flops, peak) for row in rows]


def _with_rate(row: Row, flops: float, peak: float) -> Row:
    if "total" not in row.figures:
        return row
    rates = flops / row.figures["total"].values
    figures = {
        "gflops": Figure(unit="GFLOP/s", samples=tuple((rates / 1e9).tolist())),
        "limit": Figure(unit="limit", samples=tuple((rates / peak).tolist())),
    }
    return msgspec.structs.replace(row, figures={**row.figures, **figures})


def _words(taken: Taken) -> dict[str, str]:
    """What rounds told of the whole picture: from the least to the most where they differ."""
    told = {
        word: sorted({one.words[word] for one in taken.rounds if word in one.words}, key=_numbers) for word in _WORDS
    }
    return {word: " to ".join(dict.fromkeys((every[0], every[-1]))) for word, every in told.items() if every}


def _numbers(words: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", words)))


def _picture_figures(taken: Taken, pictures: int) -> dict[str, Figure]:
    if not taken.rounds:
        return {}
    seconds = taken.samples("total_s")
    figures = {
        "total": Figure(unit="s", samples=seconds),
        "rate": Figure(unit="images/s", samples=tuple(pictures / value for value in seconds)),
        "peak": Figure(unit="MiB", samples=(max(taken.samples("peak_mib")),)),
        **seen_figures(taken),
    }
    if taken.psnr_db:
        figures["psnr"] = Figure(unit="dB", samples=tuple(taken.psnr_db))
    return figures


def _variant_figures(taken: Taken) -> dict[str, Figure]:
    figures = _picture_figures(taken, 1)
    for name in ("rate", "peak", GPU_MIB):  # the process has painted in all ways
        figures.pop(name, None)
    if taken.rounds:
        others = [taken.samples(name) for name in ("total_s", "text_s", "decode_s")]
        rows = tuple(total - text - decode for total, text, decode in zip(*others, strict=True))
        figures["denoise"] = Figure(unit="s", samples=rows)
        shares = tuple(host / of_rows for host, of_rows in zip(taken.samples("host_s"), rows, strict=True))
        figures["host"] = Figure(unit="share", samples=shares)
    return figures
