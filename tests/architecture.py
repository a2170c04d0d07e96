"""The rules of the house as data, and the pure functions that hold sources against them.

A checker takes parsed sources and returns breaches that name file and line; nothing here reads the project.
`test_architecture.py` does that, and proves on small planted sources that each rule can fail.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter

# Who may import whom, of ours.
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "common": frozenset(),
    "coordinator": frozenset({"common"}),
    "worker": frozenset({"common"}),
    "simulation": frozenset({"common", "coordinator", "worker"}),
    "cli": frozenset({"common", "coordinator", "worker", "simulation"}),
}

HEAVY = frozenset({"torch", "torchvision", "transformers", "peft", "datasets", "accelerate", "trl"})
GRPC = frozenset({"grpc", "grpc_health", "grpc_reflection", "grpc_status"})
PROTOBUF = frozenset({"raflora", "google"})
TRACKING = frozenset({"tensorboard", "mlflow", "wandb"})
CRYPTOGRAPHY = frozenset({"cryptography"})

# Where what comes from outside may be imported: file patterns.
ONLY_IN: Mapping[frozenset[str], tuple[str, ...]] = {
    HEAVY: ("worker/*", "simulation/*"),
    GRPC: (
        "coordinator/servicers/*",
        "coordinator/server*.py",
        "common/channel.py",
        "worker/client.py",
        "cli/*",
    ),
    PROTOBUF: (
        "coordinator/servicers/*",
        "coordinator/server*.py",
        "worker/client.py",
        "worker/wire_messages.py",
        "cli/*",
    ),
    TRACKING: ("common/trackers.py",),
    CRYPTOGRAPHY: ("common/certificates.py", "coordinator/identity/*", "worker/certificates.py", "cli/*"),
}

# The trainer process loads torch and speaks no gRPC; every other file of worker/ is the agent's, the other way round.
TRAINER_SIDE = "worker/trainer/"

PURE = "coordinator/federation/*"
# Its refusals are the typed errors of the wire; its reasons tell sizes as every screen does.
PURE_MAY_USE = frozenset({"common.errors", "common.sizes"})
# Part of the standard library, but not of a function whose answer depends on its arguments alone.
IMPURE = frozenset(
    {"asyncio", "datetime", "io", "logging", "os", "pathlib", "random", "secrets", "shutil", "socket"}
    | {"sqlite3", "subprocess", "tempfile", "threading", "time", "uuid"}
)

PEFT_KEY_PREFIX = "base_model." + "model"
PEFT_KEYS_IN = "worker/peft_format.py"
ENVIRONMENT_IN = "common/settings.py"
CODE_CARRIERS = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str  # relative to the repository, with slashes
    tree: ast.Module
    lines: int

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` is a.b.c, which may be a module or something inside a.b."""

    path: str
    line: int
    name: str
    at_top: bool  # carried out when the file is imported

    @property
    def package(self) -> str:
        """The first word."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Breach:
    """A rule that a line breaks."""

    path: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.sentence}"


def parse(path: str, text: str) -> Source:
    """A source from its text."""
    return Source(path, ast.parse(text, filename=path), len(text.splitlines()))


@cache
def imports_of(source: Source) -> tuple[Import, ...]:
    """Every import of a file, those inside functions too."""
    return tuple(_imports_in(source))


def _imports_in(source: Source) -> Iterator[Import]:
    deferred = {
        id(inner)
        for outer in ast.walk(source.tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_typing_only(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(source.tree):
        at_top = id(node) not in deferred
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source.path, node.lineno, alias.name, at_top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(source.path, node.lineno, f"{node.module or ''}.{alias.name}", at_top)


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def table_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Imports of ours that MAY_IMPORT does not allow."""
    for source in sources:
        room = source.path.partition("/")[0]
        for found in imports_of(source):
            if found.package in MAY_IMPORT and found.package not in MAY_IMPORT[room] | {room}:
                yield Breach(found.path, found.line, f"{room} must not import {found.package} ({found.name})")


def outside_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Imports of libraries outside the files that ONLY_IN names."""
    for source in sources:
        for found in imports_of(source):
            for libraries, patterns in ONLY_IN.items():
                if found.package in libraries and not _matches(source.path, patterns):
                    allowed = ", ".join(patterns)
                    yield Breach(found.path, found.line, f"{found.package} belongs only in {allowed}")


def worker_breaches(sources: Sequence[Source]) -> Iterator[Breach]:
    """Agent files that reach torch and trainer files that reach grpc, directly or through another file."""
    for source in sources:
        if not source.path.startswith("worker/"):
            continue
        is_trainer = source.path.startswith(TRAINER_SIDE)
        forbidden = GRPC if is_trainer else HEAVY
        side = "the trainer process, which speaks no gRPC" if is_trainer else "the agent, which loads no torch"
        for chain in reached(source, sources, top_only=False):
            if chain[-1].package in forbidden:
                yield Breach(source.path, chain[0].line, f"is part of {side}, but imports {_story(chain)}")


def start_breaches(start: str, sources: Sequence[Source], forbidden: frozenset[str]) -> Iterator[Breach]:
    """Libraries that are loaded as soon as the module `start` is imported, though they must not be."""
    source = next(s for s in sources if s.path == start)
    for chain in reached(source, sources, top_only=True):
        if chain[-1].package in forbidden:
            yield Breach(start, chain[0].line, f"loads {_story(chain)} when it is imported")


def reached(start: Source, sources: Iterable[Source], *, top_only: bool) -> Iterator[tuple[Import, ...]]:
    """Every import that a file brings about, each with one chain of imports that leads to it."""
    by_module = {source.module: source for source in sources}
    seen = {start.module}
    waiting: list[tuple[Source, tuple[Import, ...]]] = [(start, ())]
    while waiting:
        source, chain = waiting.pop()
        for found in imports_of(source):
            if top_only and not found.at_top:
                continue
            yield (*chain, found)
            target = target_of(found, by_module)
            if target and target not in seen:
                seen.add(target)
                waiting.append((by_module[target], (*chain, found)))


def target_of(found: Import, by_module: Mapping[str, Source]) -> str | None:
    """The module of ours that an import names: the longest known beginning of its name."""
    words = found.name.split(".")
    candidates = (".".join(words[:length]) for length in range(len(words), 0, -1))
    return next((name for name in candidates if name in by_module), None)


def purity_breaches(sources: Sequence[Source]) -> Iterator[Breach]:
    """Imports of the state machine, direct or not, that are not its own or pure parts of the standard library."""
    own = {s.module for s in sources if fnmatch(s.path, PURE)} | PURE_MAY_USE
    by_module = {source.module: source for source in sources}
    for source in sources:
        if not fnmatch(source.path, PURE):
            continue
        for chain in reached(source, sources, top_only=False):
            found = chain[-1]
            is_own = target_of(found, by_module) in own
            is_pure = found.package in sys.stdlib_module_names and found.package not in IMPURE
            if not is_own and not is_pure:
                yield Breach(source.path, chain[0].line, f"the state machine must not import {_story(chain)}")


def circle_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Modules that import each other in a circle, even inside a function."""
    by_module = {source.module: source for source in sources}
    graph: dict[str, dict[str, Import]] = {name: {} for name in by_module}
    for name, source in by_module.items():
        for found in imports_of(source):
            target = target_of(found, by_module)
            if target and target != name:
                graph[name].setdefault(target, found)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        first = graph[circle[0]][circle[1]]
        yield Breach(first.path, first.line, "a circle of imports: " + " > ".join(circle))


def peft_key_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Strings with PEFT's key prefix outside the one file that knows it."""
    for source in sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            if PEFT_KEY_PREFIX in node.value and source.path != PEFT_KEYS_IN:
                yield Breach(source.path, node.lineno, f"PEFT's key names stand only in {PEFT_KEYS_IN}")


def environment_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Looks at environment variables outside common/settings.py."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for source in sources:
        if source.path == ENVIRONMENT_IN:
            continue
        lines = [i.line for i in imports_of(source) if i.name in {f"os.{name}" for name in names}]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os":
                lines.append(node.lineno)
        for line in lines:
            yield Breach(source.path, line, f"environment variables are read only in {ENVIRONMENT_IN}")


def unsafe_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Ways to run code that came as data: pickle and its kin, torch.load, remote code of a hub."""
    for source in sources:
        for found in imports_of(source):
            if found.package in CODE_CARRIERS or found.name == "torch.load":
                yield Breach(found.path, found.line, f"{found.name} runs code from data; it is never used")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                yield Breach(source.path, node.lineno, "torch.load runs code from data; it is never used")
            if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
                is_refused = isinstance(node.value, ast.Constant) and node.value.value is False
                if not is_refused:
                    yield Breach(source.path, node.value.lineno, f"{node.arg} must be False or left out")


def length_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Files and functions that are too long to be read at once."""
    for source in sources:
        if source.lines > MAX_FILE_LINES:
            yield Breach(source.path, 1, f"{source.lines} lines; at most {MAX_FILE_LINES} are allowed")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    sentence = f"{node.name} has {lines} lines; at most {MAX_FUNCTION_LINES} are allowed"
                    yield Breach(source.path, node.lineno, sentence)


def docstring_breaches(sources: Iterable[Source]) -> Iterator[Breach]:
    """Files that do not open by saying what they are."""
    for source in sources:
        if not ast.get_docstring(source.tree):
            yield Breach(source.path, 1, "the file does not open with a docstring that says what it is")


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _story(chain: Sequence[Import]) -> str:
    steps = [chain[0].name, *(f"{step.name} ({step.path}:{step.line})" for step in chain[1:])]
    return " > ".join(steps)
