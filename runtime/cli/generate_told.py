"""What `tandemrt generate` tells a person: what would be painted, what became of guidance, what was painted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..output import Output
from ..plan import Plan

# What each calibration gives a run, and which command measures it.
_CALIBRATED = {
    "split": ("split of the steps", "split"),
    "interval": ("guidance interval", "guidance"),
    "adaptive": ("adaptive guidance", "guidance"),
    "hybridiff": ("window of hybridiff", "guidance"),
}


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What `--print-plan` shows of `plan_facts`: bundle, target and plan, then every prompt with its files."""
    plan, target = facts["plan"], facts["target"]
    yield f"bundle {facts['bundle']['path']} (digest {facts['bundle']['digest'][:12]})"
    yield f"target {target['name']}{_devices(facts['devices'])}: {target['reason']}"
    if facts["cloud"] is not None:
        yield f"cloud {facts['cloud']}"
    steps, rows = ", ".join(f"{count} of {name}" for name, count in plan["steps"]), len(plan["timesteps"])
    yield f"steps: {steps}; {plan['solver']}, {rows} model calls, time steps {_ends(plan['timesteps'])}"
    yield f"guidance: {_guidance(plan, rows)}"
    yield from passed_over_lines(facts)
    yield from calibration_lines(facts)
    yield from (f"{name}: {picture}" for name, picture in _named(facts["pictures"]))
    scales = facts["requests"][0]["loras"] or {}
    yield from (f"LoRA {path}, times {scales[path]:g}" for path in facts["loras"])
    for dropped in facts["dropped_text"]:
        yield f"not painted, {dropped['tokens']} tokens too many: {dropped['text']!r} of {dropped['prompt']!r}"
    files = iter(facts["files"] or ())
    for request in facts["requests"]:
        count = request["num_images_per_prompt"]
        yield f"{request['prompt']!r}: {_pictures(count)}{'' if facts['files'] else ', with a seed that is drawn'}"
        yield from (f"  {next(files)}" for _ in range(count if facts["files"] else 0))


def _devices(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    named = f", {' and '.join(f'GPU {name}' for name in facts['gpus'])}"
    if facts["direct_copies"] is None:
        return named
    how = "directly" if facts["direct_copies"] else "through the host's memory"
    return f"{named}, which copy to each other {how}"


def device_lines(facts: Mapping[str, Any] | None) -> Iterator[str]:
    """What is said of two GPUs that do not reach each other. facts: the run's devices."""
    if facts is not None and facts["direct_copies"] is False:
        yield f"{_devices(facts).removeprefix(', ')}: the driver grants no peer access"


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What each LoRA changed, then how many pictures there are, how long they took and on what."""
    engines = ", step engines" if all(image["step_engines"] for image in result["images"]) else ""
    scales = result["images"][0]["lora_scales"]
    for path, components in result["images"][0]["loras"].items():
        yield f"{path} changed {', '.join(components) if scales[path] else 'nothing: its scale is 0'}"
    pictures = _pictures(len(result["images"]))
    yield f"{pictures} in {result['seconds']:.1f} s on {result['target']}{engines}, seed {result['seed']}"


def guidance_line(plan: Plan, tried: Mapping[str, float]) -> str:
    """What became of guidance in the rows of an output's plan. tried: see `Timings`."""
    both = sum(row.guided for row in plan.ran)
    window = f", tau1 {plan.taus[0]}, tau2 {plan.taus[1]}" if plan.taus else ""
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in tried.items())
    chosen = f" ({times} a row when auto tried them)" if tried else ""
    return f"guidance: both branches in {both} of {len(plan.ran)} rows, {plan.placement}{chosen}{window}"


def cloud_lines(output: Output) -> Iterator[str]:
    """What each hand-over with a server took, also one with which it did not help."""
    for one in output.cloud:
        tries = "1 try" if one.tries == 1 else f"{one.tries} tries"
        size = f"{one.sent_bytes / 1e3:.1f} kB there, {one.received_bytes / 1e3:.1f} kB back"
        done = f"{one.steps} steps" if one.received_bytes else f"no help with {one.steps} steps"
        yield f"cloud: {done} in {one.seconds:.2f} s, {tries}, {size}"


def calibration_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is said of defaults that were measured with other models, steps or guidance than the run's.

    facts: those of `stored_facts`, and the run's plan.
    """
    for name in facts["outdated"]:
        what, command = _CALIBRATED[name]
        yield (
            f"the bundle's {what} was measured with other models than it has now: run `tandemrt calibrate {command}` "
            "again"
        )
    for name, measured in facts["measured_for"].items():
        what, command = _CALIBRATED[name]
        yield (
            f"the bundle's {what} was measured with {_runs(measured)}, and is used with {_runs(facts['plan'])}: run "
            f"`tandemrt calibrate {command}` with these, or give numbers of your own"
        )


def _runs(plan: Mapping[str, Any]) -> str:
    """Steps and guidance, as options name them."""
    return f"--steps {_steps(plan['steps'])} --guidance-scale {plan['guidance_scale']:g}"


def _steps(steps: Iterable[tuple[str, int]]) -> str:
    """Runs of steps as --steps takes them."""
    return ",".join(f"{name}:{count}" for name, count in steps)


def passed_over_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is said where a number of steps stands in the place of a stored split. facts: of `stored_facts`."""
    if facts["passed_over"]:
        split = _steps(facts["passed_over"])
        yield f"a number of steps is the first denoiser's: the bundle's own split, --steps {split}, is passed over"


def _guidance(plan: Mapping[str, Any], rows: int) -> str:
    told = f"{plan['guidance_scale']:g}, both branches in {sum(plan['guided'])} of {rows} model calls"
    rules = {"adaptive": plan["adaptive"], **(plan["window"] or {})}
    ruled = [f"{name} ({', '.join(f'{key} {value:g}' for key, value in rule.items())})"
             for name, rule in rules.items() if rule is not None]  # fmt: skip
    return ", ".join([told, *ruled, plan["placement"]])


def _ends(timesteps: list[float]) -> str:
    return " … ".join(f"{each:g}" for each in dict.fromkeys((timesteps[0], timesteps[-1])))


def _named(pictures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each picture's path, by its argument and, of ControlNets, its name."""
    for name, one in pictures.items():
        if "path" in one:
            yield name, one["path"]
        else:
            yield from ((f"{name} {inner}", picture) for inner, picture in _named(one))


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
