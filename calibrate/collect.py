"""`tandemrt calibrate collect`: paint prompts, and keep what the models were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import msgspec

from ..runtime.cli.pictures import check_folder
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import CalibrationError
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Plan, Schedule, compile_plan
from ..runtime.targets import installed_version
from .collect_arguments import PROMPTS, CollectPlan, add_arguments, plan_from_arguments
from .course import course_of
from .prompts import chosen_prompts, prompts_sha256
from .run_folder import RunFolder
from .strata import Runs, kept_rows
from .trajectories import (
    AGAIN,
    FILE_NAMES,
    RECORD_NAME,
    Array,
    Record,
    Run,
    encoded_runs,
    file_name,
    models_digest,
    read_record,
)

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "summary"]


def plan_facts(plan: CollectPlan) -> dict[str, Any]:
    """What would be painted and kept, JSON-able; no model is loaded.

    Raises:
        TandemError: as `run`, where it can be known beforehand.
    """
    seen = _Seen()
    with _opened(plan, seen) as pipe:
        job = _job(plan, pipe, seen)
        found = job.folder(plan).there()
        return {
            "out": str(plan.out),
            "bundle": {"path": str(pipe.bundle.path), "digest": pipe.bundle.digest},
            "settings": job.record.settings,
            "prompts": len(job.record.prompts),
            "there": len(found),
            "steps": [list(map(list, runs)) for runs in dict.fromkeys(job.steps)],
            "kept": job.kept_by_row(),
        }


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What would be painted and kept, for a person."""
    settings = facts["settings"]
    yield f"{facts['prompts']} prompts, {facts['there']} of them there, to {facts['out']}"
    yield (
        f"{settings['width']}x{settings['height']}, guidance {settings['guidance_scale']:g}, on {settings['target']}, "
        f"seeds from {settings['seed']} on"
    )
    for runs in facts["steps"]:
        yield "steps " + ", ".join(f"{name} {count}" for name, count in runs)
    for name, rows in facts["kept"].items():
        yield f"{name}: {sum(rows)} runs kept, {min(rows)} to {max(rows)} of each of {len(rows)} rows"


def run(plan: CollectPlan, reporter: Reporter) -> dict[str, Any]:
    """Paint what is not there yet, and keep what the models were given.

    Raises:
        ArgumentError: an argument cannot be used, prompts are held out too, or the folder holds something else or what
            was collected in another way.
        CalibrationError: the folder's record is damaged.
        TandemError: the bundle or the target cannot be used, a model failed, or the folder cannot be written.
    """
    seen = _Seen()
    with _opened(plan, seen) as pipe:
        job = _job(plan, pipe, seen)
        check_folder((plan.out / RECORD_NAME,), force=True, option="--out")
        with job.folder(plan) as folder:
            return _collected(folder, job, reporter)


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What was kept, for a person."""
    kept = ", ".join(f"{count} of {name}" for name, count in result["runs"].items())
    yield f"{result['out']}: {kept}; {result['size_bytes'] / 1e6:.1f} MB, digest {result['digest']}"


class _Seen:
    """What models were given since it was last taken, of the rows that are to be kept.

    row: that runs, or comes next. rows: to be kept. denoisers: what runs in rows; all else is kept in any case.
    """

    def __init__(self) -> None:
        self.row, self.rows, self.denoisers = 0, frozenset[int](), frozenset[str]()
        self._given: list[tuple[str, int, dict[str, Array]]] = []

    def __call__(self, name: str, inputs: Mapping[str, Array]) -> None:
        if name not in self.denoisers or self.row in self.rows:
            self._given.append((name, self.row, {key: values.copy() for key, values in inputs.items()}))

    def begin(self, rows: frozenset[int]) -> None:
        """A generation begins, of which these rows are to be kept."""
        self.row, self.rows, self._given = 0, rows, []

    def taken(self) -> list[tuple[str, int, dict[str, Array]]]:
        """The component, the row and the inputs of every run, in their order."""
        given, self._given = self._given, []
        return given


@dataclass(frozen=True)
class _Job:
    """What is collected. record: without files. steps, rows: of every prompt, by its index.

    plans: by steps. arguments: of `Request`, the same for all prompts.
    """

    pipe: Pipeline
    seen: _Seen
    record: Record
    steps: tuple[Runs, ...]
    rows: tuple[tuple[int, ...], ...]
    plans: Mapping[Runs, Plan]
    arguments: Mapping[str, Any]
    dropped: set[str] = field(default_factory=set)

    def paint(self, index: int, reporter: Reporter) -> list[Run]:
        """Paint a prompt; what is to be kept of it."""
        prompt, steps = self.record.prompts[index], self.steps[index]
        plan = self.plans[steps]
        self.seen.begin(frozenset(self.rows[index]))
        stream = self.pipe.stream(prompt=prompt, steps=steps, seed=self.seed(index), **self.arguments)
        total = len(self.record.prompts) * plan.table.rows
        for event in stream:
            self.seen.row = event.row + 1
            reporter.progress("rows painted", index * event.rows + event.row + 1, total)
        for cut in stream.result().dropped_text:
            if cut.prompt not in self.dropped:
                self.dropped.add(cut.prompt)
                reporter.warn(f"{cut.tokens} tokens too many, not painted: {cut.text!r} of {cut.prompt!r}")
        return list(self._runs(index, plan))

    def folder(self, plan: CollectPlan) -> RunFolder:
        """Where it is collected."""
        ground = msgspec.to_builtins(self.record)
        del ground["files"]
        return RunFolder(plan.out, RECORD_NAME, FILE_NAMES, ground, discard=plan.discard)

    def seed(self, index: int) -> int:
        """The seed of a prompt."""
        return int(self.record.settings["seed"]) + index

    def kept_by_row(self) -> dict[str, list[int]]:
        """By denoiser, how many runs are kept of each row, in both branches together."""
        kept: dict[str, list[int]] = {}
        for steps, rows in zip(self.steps, self.rows, strict=True):
            plan = self.plans[steps]
            for row in rows:
                counts = kept.setdefault(plan.denoisers[row], [0] * plan.table.rows)
                counts[row] += 1 + plan.guided[row]
        return kept

    def _runs(self, index: int, plan: Plan) -> Iterator[Run]:
        components, counts = self.pipe.bundle.manifest.components, dict[tuple[str, int], int]()
        for name, row, given in self.seen.taken():
            nth = counts.get((name, row), 0)
            counts[name, row] = nth + 1
            # An engine may have been made with more inputs than the component, which is given zeros for them.
            inputs = {spec.name: given[spec.name] for spec in components[name].inputs}
            if name in self.seen.denoisers:
                yield Run(name, inputs, row, float(plan.table.timesteps[row]), nth)
            elif nth == 0 or index == 0:  # the negative prompt is the same for all
                yield Run(name, inputs)


def _opened(plan: CollectPlan, seen: _Seen) -> Pipeline:
    return Pipeline.open(plan.bundle, plan.target, threads=plan.threads, cache=plan.cache, observe=seen)


def _job(plan: CollectPlan, pipe: Pipeline, seen: _Seen) -> _Job:
    """All that can be refused before a model is loaded."""
    manifest = pipe.bundle.manifest
    prompts = chosen_prompts(plan.prompts, plan.column, plan.count, PROMPTS, plan.held_out)
    seen.denoisers = frozenset(manifest.names("denoiser"))
    course = course_of(plan, pipe.bundle, len(prompts))
    schedule: dict[str, Any] = {"guidance_scale": plan.guidance_scale, "timesteps": course.timesteps}
    plans = {runs: compile_plan(manifest, Schedule(steps=runs, **schedule)) for runs in dict.fromkeys(course.steps)}
    arguments = {
        **schedule,
        "negative_prompt": plan.negative_prompt,
        "height": plan.height,
        "width": plan.width,
        # A branch at a time, so that a run is one picture's, and on no step engines, which would hide it.
        "placement": "sequential",
        "output_type": "np",
    }
    for runs in plans:
        pipe.stream(prompt=prompts[0], steps=runs, seed=plan.seed + len(prompts) - 1, **arguments)
    some, groups = plans[course.steps[0]], -(-len(prompts) // course.turns)
    settings = {
        "target": str(pipe.target),
        "denoisers": list(course.visited),
        "steps": [list(run) for run in course.steps[0]] if course.turns == 1 else sum(n for _, n in course.steps[0]),
        "timesteps": None if course.timesteps is None else list(course.timesteps),
        "guidance_scale": some.guidance_scale,
        "negative_prompt": plan.negative_prompt,
        "height": manifest.defaults.height if plan.height is None else plan.height,
        "width": manifest.defaults.width if plan.width is None else plan.width,
        "seed": plan.seed,
        "rows": plan.rows,
    }
    return _Job(
        pipe=pipe,
        seen=seen,
        record=_record(pipe, course.visited, settings, prompts),
        steps=course.steps,
        rows=tuple(kept_rows(some.table.rows, plan.rows, at // course.turns, groups) for at in range(len(prompts))),
        plans=plans,
        arguments=arguments,
    )


def _record(pipe: Pipeline, denoisers: Sequence[str], settings: dict[str, Any], prompts: tuple[str, ...]) -> Record:
    """What is to be collected, as a record without files."""
    manifest, backend = pipe.bundle.manifest, pipe.target.backend
    components = (*manifest.text.encoders, *denoisers, manifest.names("vae_decoder")[0])
    return Record(
        bundle=pipe.bundle.digest,
        models=models_digest(manifest, components),
        components=components,
        settings=settings,
        versions={"tandemrt": version("tandemrt"), backend: installed_version(backend)},
        prompts=prompts,
        prompts_sha256=prompts_sha256(prompts),
        files={},
    )


def _collected(folder: RunFolder, job: _Job, reporter: Reporter) -> dict[str, Any]:
    """Paint the prompts whose files are not there."""
    prompts = job.record.prompts
    names = [file_name(index) for index in range(len(prompts))]
    missing = folder.missing(names, "prompts", reporter)
    for index in missing:
        facts = {"prompt": prompts[index], "seed": str(job.seed(index))}
        content, places = encoded_runs(job.paint(index, reporter), facts)
        folder.add(names[index], content, {"runs": places})
    found = read_record(folder.path)
    if found is None:
        raise CalibrationError(str(folder.path / RECORD_NAME), "was removed", remedy=AGAIN)
    record, digest = found
    counts = {name: sum(len(kept.runs.get(name, ())) for kept in record.files.values()) for name in record.components}
    return {
        "out": str(folder.path),
        "bundle": record.bundle,
        "prompts": len(prompts),
        "painted": len(missing),
        "runs": counts,
        "kept": job.kept_by_row(),
        "size_bytes": sum(kept.size for kept in record.files.values()),
        "settings": record.settings,
        "digest": digest,
    }
