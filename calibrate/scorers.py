"""Scorers of one's own: functions that say of pictures whether they show their prompts, by the names they have."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..runtime.backends.buffers import one_line
from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.files import file_sha256
from .quality import Pixels, Scorer


@dataclass(frozen=True, slots=True)
class NamedScorer:
    """A `Scorer` that `--scorer` names. name: `MODULE:FUNCTION`. sha256: see `source_sha256`."""

    name: str
    sha256: str
    _function: Callable[[Sequence[str], Pixels], Sequence[bool]]

    def __call__(self, prompts: Sequence[str], pictures: Pixels) -> tuple[bool, ...]:
        """One answer for each picture; raises CalibrationError where the function failed, or gave something else."""
        where = f"--scorer {self.name}"
        try:
            answers = [(answer, bool(answer)) for answer in self._function(prompts, pictures)]
            wrong = [index for index, (answer, taken) in enumerate(answers) if not bool(answer == taken)]
        except Exception as error:  # a function of the user's own can fail in any way
            raise CalibrationError(where, f"failed ({type(error).__name__}: {one_line(error)})") from error
        if wrong:
            what, remedy = f"answer {wrong[0]} of {len(answers)}", "Compare scores with a threshold in the function."
            raise CalibrationError(where, what, got=answers[wrong[0]][0], expected="True or False", remedy=remedy)
        if len(answers) != len(prompts):
            expected = f"{len(prompts)}, one for each picture"
            raise CalibrationError(where, "how many answers it gave", got=len(answers), expected=expected)
        return tuple(taken for _, taken in answers)

    def facts(self) -> dict[str, str]:
        """What figures rest on that it made, JSON-able."""
        return {"name": self.name, "sha256": self.sha256}


def scorer_of(text: str) -> NamedScorer:
    """The scorer that `MODULE:FUNCTION` names; the module is imported, also from the current folder.

    Raises:
        ArgumentError: not of this form, no such module or function, or the module cannot be imported.
    """
    name, colon, function = text.partition(":")
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in name.split("."))):
        raise ArgumentError("--scorer", "not a scorer", got=text, expected="MODULE:FUNCTION such as my_scores:shows")
    module = _imported(name, text)
    found = getattr(module, function, None)
    if not callable(found):
        what, expected = f"no function {function} in {name}", "a function of prompts and pictures"
        raise ArgumentError("--scorer", what, got=text, expected=expected)
    scorer: Scorer = found
    return NamedScorer(text, source_sha256(module), scorer)


def source_sha256(module: ModuleType) -> str:
    """A sha256 over a module's file and those of the modules of its package that it imports, and these import.

    Of a module in no package, those of its folder are meant, and none where that is one that packages are installed in.
    """
    files: dict[str, Path] = {}
    waiting = [(module.__name__, Path(module.__file__))] if module.__file__ else []
    while waiting:
        name, file = waiting.pop()
        if name not in files:
            files[name] = file
            beside = ((other, _beside(module, other)) for other in _imports(name, file))
            waiting += [(other, path) for other, path in beside if path is not None]
    digests = [f"{name} {file_sha256(files[name])}\n" for name in sorted(files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _imported(name: str, text: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.append(here)  # behind everything else, so that a file here hides no package
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module's code can fail in any way
        what = f"{name} cannot be imported ({type(error).__name__}: {error})"
        remedy = "Run in the folder where it lies, or install it."
        raise ArgumentError("--scorer", what, got=text, remedy=remedy) from error
    finally:
        sys.path.remove(here)


def _imports(name: str, file: Path) -> Iterator[str]:
    """What a module's source imports, wherever in it: modules, and what may be a module or a name in one."""
    try:
        tree = ast.parse(file.read_bytes()) if file.suffix == ".py" else ast.Module(body=[], type_ignores=[])
    except (SyntaxError, ValueError):  # what cannot be imported imports nothing
        return
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _beside(module: ModuleType, name: str) -> Path | None:
    """The file of a module of this name in another's package or folder; None where there is none, or it is a name."""
    folder, package = Path(module.__file__ or "").parent, module.__package__ or ""
    if not package and str(folder) in sysconfig.get_paths().values():
        return None
    if package and not f"{name}.".startswith(f"{package}."):
        return None
    path = folder.joinpath(*name[len(package) :].strip(".").split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
