"""Checks the library's layers, sizes and docstrings, by reading the syntax tree of a file.

Everything here is a pure function of text; ``tests/test_architecture.py`` applies it to every file, and to planted
violations of each rule.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50  # without docstring and decorators

LAYERS = (  # bottom up; CONTRIBUTING.md says what each package is for
    {"errors", "types", "config", "init", "buffers"},
    {"kernels"},
    {"routing", "balance", "experts", "dispatch", "placement", "monitor"},
    {"layer"},
    {"models"},
    {"parallel", "checkpoint", "editing"},
    {"__init__"},  # what `import moe` brings: the layer, its parts and what spreads them; no model, no training
    {"training", "verify", "planning", "integrations"},
    {"serving"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
FREE_SIBLINGS = LAYERS[0]  # the words may use each other; in every higher layer siblings stay apart
FACADE = "moe.__init__"  # may bring a part when it is asked for, so that `import moe` stays quick
SERVING_ADAPTER = "moe.serving.adapter"  # the one file of moe.serving that may know torch and the model

ONLY_IN = {  # what may be imported -> by which packages of moe
    "torch.distributed": {"parallel", "checkpoint"},
    "hydra": set(),
    "omegaconf": set(),
    "transformers": {"integrations"},
    "lightning": {"integrations"},
    "pytorch_lightning": {"integrations"},
    "accelerate": {"integrations"},
}

DYNAMIC = "<dynamic>"  # what import_module and __import__ bring


@dataclass(frozen=True)
class Import:
    """One name that a module imports, as far as its syntax tells."""

    target: str
    line: int
    in_function: bool


@dataclass(frozen=True)
class Violation:
    """A rule that a module breaks, and where."""

    rule: str
    line: int
    message: str


class ImportReader(ast.NodeVisitor):
    """Collects imports wherever they hide: in functions, under TYPE_CHECKING, relative, dynamic."""

    def __init__(self, module: str) -> None:
        self.package = module.rpartition(".")[0]
        self.depth = 0
        self.imports: list[Import] = []

    def _add(self, target: str, node: ast.AST) -> None:
        self.imports.append(Import(target, node.lineno, in_function=self.depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        anchor = self.package.split(".")
        anchor = anchor[: len(anchor) - node.level + 1] if node.level else []
        base = ".".join([*anchor, node.module] if node.module else anchor)
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "distributed" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            self._add("torch.distributed", node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}:
            self._add(DYNAMIC, node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)


def read_imports(tree: ast.Module, module: str) -> list[Import]:
    reader = ImportReader(module)
    reader.visit(tree)
    return reader.imports


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def violations(source: str, module: str) -> list[Violation]:
    """List the rules that a module breaks.

    Args:
        source: its text.
        module: its dotted name; a package is named by its file, ``moe.routing.__init__``.

    Returns:
        One record a violation, in no particular order.
    """
    tree = ast.parse(source)
    imports = read_imports(tree, module)
    found = [*_sizes(source, tree), *(v for item in imports for v in _folders(item, module))]
    if within(module, "moe"):
        package = module.split(".")[1]
        if package not in LEVEL:
            return [*found, Violation("unknown", 1, f"moe.{package} has no layer; give it one in LAYERS")]
        found += [v for item in imports for v in _layering(item, module, package)]
        found += [v for item in imports for v in _third_parties(item, module, package)]
        found += _definitions(tree, module)
    return found


def _folders(item: Import, module: str) -> Iterator[Violation]:
    root, own = item.target.partition(".")[0], module.partition(".")[0]
    if root == "kernels":
        yield Violation("kernels", item.line, "the folder kernels/ is imported as moe.kernels")
    if root in {"examples", "benchmarks", "tests"} and own not in {root, "tests"}:
        yield Violation("outside", item.line, f"nothing imports {root}/")


def _layering(item: Import, module: str, package: str) -> Iterator[Violation]:
    ours = within(item.target, "moe")
    late = item.in_function and module != FACADE
    if item.target == DYNAMIC or (ours and late):
        yield Violation("hidden", item.line, f"{item.target} is imported where no reader looks for it")
    if not ours:
        return
    target = item.target.split(".")[1] if "." in item.target else ""
    if target not in LEVEL:
        yield Violation("facade", item.line, f"{item.target}: name the module that defines it")
    elif package == "serving":
        if target not in {"serving", "errors"} and module != SERVING_ADAPTER:
            yield Violation("serving", item.line, f"only {SERVING_ADAPTER} may import {item.target}")
    elif LEVEL[target] > LEVEL[package]:
        yield Violation("upward", item.line, f"{item.target} is in a layer above moe.{package}")
    elif LEVEL[target] == LEVEL[package] and target != package and target not in FREE_SIBLINGS:
        yield Violation("siblings", item.line, f"{item.target} is beside moe.{package}, in the same layer")


def _third_parties(item: Import, module: str, package: str) -> Iterator[Violation]:
    for name, packages in ONLY_IN.items():
        if within(item.target, name) and package not in packages:
            who = sorted(packages) or "examples/ and benchmarks/"
            yield Violation(name, item.line, f"only {who} may import {name}")
    if within(item.target, "triton") and not module.rpartition(".")[2].startswith("triton_"):
        yield Violation("triton", item.line, "only triton_*.py files may import triton")
    if within(item.target, "torch") and package == "serving" and module != SERVING_ADAPTER:
        yield Violation("serving", item.line, f"only {SERVING_ADAPTER} may import torch")


def _sizes(source: str, tree: ast.Module) -> Iterator[Violation]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield Violation("file size", lines, f"{lines} lines, over {MAX_FILE_LINES}")
    text = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The body alone: an op's schema and a kernel's arguments are one a line.
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            code = text[body[0].lineno - 1 : node.end_lineno] if body else []
            lines = sum(not line.lstrip().startswith("#") for line in code)
            if lines > MAX_FUNCTION_LINES:
                yield Violation("function size", node.lineno, f"{node.name}: {lines} lines, over {MAX_FUNCTION_LINES}")


def _definitions(tree: ast.Module, module: str) -> Iterator[Violation]:
    owners: list[ast.Module | ast.ClassDef] = [tree]
    for owner in owners:  # grows by the public classes on the way
        for node in owner.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.ClassDef):
                if module.startswith("moe.kernels.") and any(ast.unparse(b).endswith("Module") for b in node.bases):
                    yield Violation("module", node.lineno, f"{node.name}: kernels are functions, not modules")
                owners += [] if node.name.startswith("_") else [node]
            # A Triton kernel is no Python function: its documentation is the public function that launches it.
            marks = [ast.unparse(decorator) for decorator in node.decorator_list]
            told = ast.get_docstring(node) or any(mark.startswith(("overload", "triton.jit")) for mark in marks)
            if not told and not node.name.startswith("_"):
                yield Violation("docstring", node.lineno, f"{node.name} has no docstring")


def find_cycle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import each other in a ring, first and last the same, or an empty list."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def resolve(target: str, modules: set[str]) -> str | None:
    """Return the module that a target is or lies in: ``moe.types.Routing`` lies in ``moe.types``."""
    folder = any(within(module, target) for module in modules)  # `from moe import kernels`: no file of its own
    parent = target.rpartition(".")[0]
    return target if target in modules else parent if parent in modules and not folder else None


def read_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Map each module to the modules among ``sources`` that it imports; keys as for ``violations``."""
    names = {module.removesuffix(".__init__") for module in sources}
    graph = {}
    for module, source in sources.items():
        targets = {resolve(item.target, names) for item in read_imports(ast.parse(source), module)}
        graph[module.removesuffix(".__init__")] = targets - {None}
    return graph
