"""Which folder may import what: the table of the design, held to by reading every file's imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("export", "engines", "runtime", "calibrate", "serve", "bench")
FILES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

BACKENDS = frozenset({"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"})
TORCH_STACK = frozenset({"torch", "diffusers", "transformers", "safetensors"})
NOT_IN_PYTHON_3_10 = frozenset({"tomllib", "annotationlib", "compression"})
ANYTHING = None


@dataclass(frozen=True)
class Rule:
    """What a folder may import besides itself and the standard library.

    `ours` and `third_party` hold everywhere in a file, `lazy_ours` and `lazy_third_party` inside functions and under
    TYPE_CHECKING only. ANYTHING lifts the limit.
    """

    ours: frozenset[str] = frozenset()
    third_party: frozenset[str] | None = frozenset()
    lazy_ours: frozenset[str] = frozenset()
    lazy_third_party: frozenset[str] | None = frozenset()


RUNTIME_THIRD_PARTY = frozenset({"numpy", "tokenizers", "PIL", "msgspec"})
# Torch models are the whole purpose of these two; in the rest of bench/ torch waits for a function that needs it.
BENCH_BUILDER = Rule(ours=frozenset(FOLDERS), third_party=ANYTHING)

SERVE_THIRD_PARTY = frozenset({"numpy", "msgspec", "PIL", "starlette", "prometheus_client"})
SERVE_ON_RAY = Rule(ours=frozenset({"runtime"}), third_party=SERVE_THIRD_PARTY | {"ray"})

# The longest matching prefix of a file's path decides.
RULES = {
    "serve/ray_app.py": SERVE_ON_RAY,
    "serve/ray_calls.py": SERVE_ON_RAY,
    "runtime/": Rule(third_party=RUNTIME_THIRD_PARTY, lazy_third_party=BACKENDS),
    # The command line loads each command from its own folder, when that command is asked for.
    "runtime/cli/": Rule(
        third_party=RUNTIME_THIRD_PARTY | {"rich"}, lazy_third_party=BACKENDS, lazy_ours=frozenset(FOLDERS)
    ),
    "engines/": Rule(
        ours=frozenset({"runtime"}),
        third_party=frozenset({"numpy", "msgspec", "onnx"}),
        lazy_third_party=BACKENDS | {"polygraphy"},
    ),
    "export/": Rule(
        ours=frozenset({"runtime"}),
        third_party=TORCH_STACK | {"numpy", "msgspec", "tokenizers", "onnx", "onnx_ir", "onnxscript"},
        lazy_third_party=frozenset({"onnxruntime"}),
    ),
    "serve/": Rule(
        ours=frozenset({"runtime"}),
        third_party=SERVE_THIRD_PARTY,
        lazy_third_party=frozenset({"uvicorn"}),
    ),
    # Quantizers and measures by trained networks wait for what needs them.
    "calibrate/": Rule(
        ours=frozenset({"runtime", "engines"}),
        third_party=frozenset({"numpy", "msgspec", "onnx", "PIL"}),
        lazy_third_party=TORCH_STACK | {"onnxruntime", "huggingface_hub", "lpips", "torch_fidelity", "nncf"},
    ),
    "bench/": Rule(
        ours=frozenset(FOLDERS),
        third_party=frozenset({"numpy", "scipy", "PIL", "msgspec", "rich"}),
        lazy_third_party=ANYTHING,
    ),
    # Scripts that run in peers' environments, beside `wire` and `borrowed`, which import nothing.
    "bench/peers/": Rule(
        third_party=frozenset({"wire", "borrowed"}), lazy_third_party=ANYTHING, lazy_ours=frozenset(FOLDERS)
    ),
    "bench/shapes/family.py": BENCH_BUILDER,
    "bench/shapes/inheritance.py": BENCH_BUILDER,
    "bench/shapes/learning.py": BENCH_BUILDER,
    "bench/shapes/publishing.py": BENCH_BUILDER,
    "bench/shapes/train.py": BENCH_BUILDER,
}


@dataclass(frozen=True)
class Import:
    """One imported module: its absolute dotted name, its line, and whether it waits until a function runs."""

    module: str
    line: int
    lazy: bool


def modules_of(node: ast.AST, package: str) -> list[str]:
    """Absolute names of the modules that a node imports; a literal `import_module("x")` counts as an import of x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names] if module == "tandemrt" else [module]
    if isinstance(node, ast.Call) and node.args:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        name = node.args[0]
        if called in {"import_module", "__import__"} and isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [name.value]
    return []


def is_type_checking(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:`, whose body no interpreter runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import of a file whose package is `package`, such as `tandemrt.runtime.backends`."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, lazy = pending.pop()
        for module in modules_of(node, package):
            yield Import(module, getattr(node, "lineno", 0), lazy)
        inside = lazy or is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def allows(rule: Rule, folder: str, found: Import) -> bool:
    """Whether a file of `folder` under `rule` may have this import."""
    first, _, rest = found.module.partition(".")
    if first == "tandemrt":
        return rest.partition(".")[0] in {folder, *rule.ours, *(rule.lazy_ours if found.lazy else ())}
    if first in sys.stdlib_module_names | {"__future__"}:
        return first not in NOT_IN_PYTHON_3_10
    if rule.third_party is ANYTHING or (found.lazy and rule.lazy_third_party is ANYTHING):
        return True
    return first in rule.third_party or (found.lazy and first in (rule.lazy_third_party or ()))


def violations(path: str, source: str) -> list[str]:
    """What a file at `path` imports and should not, one line each."""
    rule = RULES[max((prefix for prefix in RULES if path.startswith(prefix)), key=len)]
    package = ".".join(["tandemrt", *path.split("/")[:-1]])
    return [
        f"{path}:{found.line}: imports {found.module} {'inside a function' if found.lazy else 'on top'}; "
        f"this folder's rule in tests/test_import_directions.py does not allow it"
        for found in imports_of(source, package)
        if not allows(rule, path.partition("/")[0], found)
    ]


@pytest.mark.parametrize("path", FILES)
def test_file_imports_only_what_its_folder_may(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/x.py", "import torch"),
        ("runtime/x.py", "def f():\n    from torch.nn import functional"),
        ("runtime/x.py", "import onnxruntime"),
        ("runtime/x.py", "try:\n    import onnxruntime\nexcept ImportError:\n    pass"),
        ("runtime/x.py", "class A:\n    import onnxruntime"),
        ("runtime/x.py", "import rich"),
        ("runtime/x.py", "def f():\n    from tandemrt import export"),
        ("runtime/x.py", "def f():\n    from ..export import pruned"),
        ("runtime/backends/x.py", "def f():\n    from ...engines import steps"),
        ("runtime/x.py", "def f():\n    importlib.import_module('diffusers')"),
        ("runtime/x.py", "if TYPE_CHECKING:\n    import torch"),
        ("runtime/x.py", "import tomllib"),
        ("runtime/cli/x.py", "import tandemrt.export"),
        ("runtime/cli/x.py", "def f():\n    import torch"),
        ("engines/x.py", "def f():\n    import torch"),
        ("engines/x.py", "from tandemrt.calibrate import ranges"),
        ("export/x.py", "from tandemrt.engines import steps"),
        ("calibrate/x.py", "from tandemrt.bench import report"),
        ("bench/x.py", "import torch"),
    ],
)
def test_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/x.py", "from __future__ import annotations\nimport json\nimport numpy.typing as npt"),
        ("runtime/x.py", "from tandemrt.runtime import errors\nfrom .errors import TandemError"),
        ("runtime/backends/x.py", "from ..errors import TandemError\ndef f():\n    import onnxruntime"),
        ("runtime/x.py", "if TYPE_CHECKING:\n    import onnxruntime"),
        ("runtime/cli/x.py", "from rich import progress\ndef f():\n    import_module('tandemrt.export.command')"),
        ("engines/x.py", "import onnx\nfrom tandemrt.runtime import manifest"),
        ("calibrate/x.py", "from tandemrt.engines import steps"),
        ("bench/x.py", "def f():\n    import torch\n    from tandemrt.export import pruned"),
    ],
)
def test_allowed_import_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


IMPORT_EVERY_RUNTIME_MODULE = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import tandemrt.runtime
def fail(name):
    raise
for module in pkgutil.walk_packages(tandemrt.runtime.__path__, "tandemrt.runtime.", onerror=fail):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_runtime_imports_with_everything_heavy_blocked() -> None:
    blocked = sorted({*TORCH_STACK, *BACKENDS, "onnx", "onnxscript", "peft", "scipy", "polygraphy"})
    command = [sys.executable, "-c", IMPORT_EVERY_RUNTIME_MODULE, *blocked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dotted = (f"tandemrt/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES)
    expected = {name for name in dotted if name.startswith("tandemrt.runtime.") and not name.endswith("__main__")}
    missing = expected - set(done.stdout.split())
    assert not missing, f"{sorted(missing)} are not linked into the editable install; make check does it"
