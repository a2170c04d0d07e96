"""The project against the rules of tests/architecture.py, and each rule against a source that breaks it."""

import subprocess
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import architecture as rules
import pytest
from architecture import Breach, Source, parse

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tuple(rules.MAY_IMPORT)


def _is_ours(path: str) -> bool:
    return path.endswith(".py") and not path.endswith(("_pb2.py", "_pb2_grpc.py"))


def _sources(folders: Iterable[str]) -> tuple[Source, ...]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return tuple(parse(name, (ROOT / name).read_text(encoding="utf-8")) for name in names if _is_ours(name))


PRODUCT = _sources(PACKAGES)
EVERYTHING = PRODUCT + _sources(("proto", "tests", "benchmarks", "docs", "examples"))


def _hold(breaches: Iterable[Breach]) -> None:
    report = "\n".join(str(breach) for breach in breaches)
    if report:
        pytest.fail(report, pytrace=False)


def _sentences(breaches: Iterable[Breach]) -> list[str]:
    return [str(breach) for breach in breaches]


# --- the project


def test_packages_import_only_whom_the_table_allows() -> None:
    _hold(rules.table_breaches(PRODUCT))


def test_libraries_are_imported_only_where_they_belong() -> None:
    _hold(rules.outside_breaches(PRODUCT))


def test_the_agent_reaches_no_torch_and_the_trainer_no_grpc() -> None:
    _hold(rules.worker_breaches(PRODUCT))


def test_the_state_machine_imports_only_pure_parts_of_the_standard_library() -> None:
    _hold(rules.purity_breaches(PRODUCT))


def test_no_modules_import_each_other_in_a_circle() -> None:
    _hold(rules.circle_breaches(PRODUCT))


@pytest.mark.parametrize("verb", sorted(s.path for s in PRODUCT if s.path.startswith("cli/")))
def test_the_command_starts_without_what_only_workers_install(verb: str) -> None:
    # `raflora --help` loads every verb, also where only the coordinator is installed.
    extras = rules.HEAVY | {"sklearn", "matplotlib", "PIL"}
    _hold(rules.start_breaches(verb, PRODUCT, extras))


def test_peft_key_names_stand_in_one_file() -> None:
    _hold(rules.peft_key_breaches(PRODUCT))


def test_environment_variables_are_read_in_one_file() -> None:
    _hold(rules.environment_breaches(PRODUCT))


def test_nothing_runs_code_that_came_as_data() -> None:
    # Tests are left out: some must forge what an attacker would send.
    _hold(rules.unsafe_breaches(PRODUCT + _sources(("proto", "benchmarks", "docs", "examples"))))


def test_files_and_functions_are_short_enough_to_be_read() -> None:
    _hold(rules.length_breaches(EVERYTHING))


def test_every_file_says_what_it_is() -> None:
    _hold(rules.docstring_breaches(EVERYTHING))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imported_package_is_this_checkout_s(package: str) -> None:
    # The names are generic: another distribution's `common` would be taken silently.
    assert Path(import_module(package).__file__ or "").resolve().parent == ROOT / package


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    # Only inside a clone; elsewhere (an unpacked sdist) there is no list of what belongs to the project.
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    private = ("/wo" + "rk/", "/ro" + "ot/", "file" + ":///")
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".binpb", ".safetensors", ".gz"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not any(word in line for word in private), f"{name}:{number}: {line.strip()}"


# --- the rules themselves: each can fail


def test_the_table_catches_a_coordinator_that_imports_a_worker() -> None:
    planted = parse("coordinator/engine.py", "import json\nfrom worker.client import Client\n")
    assert _sentences(rules.table_breaches([planted])) == [
        "coordinator/engine.py:2: coordinator must not import worker (worker.client.Client)"
    ]


def test_the_table_catches_a_common_that_imports_anything_of_ours() -> None:
    planted = parse("common/logs.py", "def f():\n    import cli.main\n")
    assert _sentences(rules.table_breaches([planted])) == ["common/logs.py:2: common must not import cli (cli.main)"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("coordinator/engine.py", "import torch.nn"),
        ("cli/demo.py", "from transformers import Trainer"),
        ("coordinator/engine.py", "import grpc.aio"),
        ("worker/agent.py", "import grpc"),
        ("simulation/run.py", "from grpc_health.v1 import health"),
        ("coordinator/engine.py", "from raflora.v1 import status_pb2"),
        ("worker/agent.py", "from google.protobuf.message import Message"),
    ],
)
def test_a_library_in_the_wrong_file_is_caught(path: str, line: str) -> None:
    assert [b.line for b in rules.outside_breaches([parse(path, f'"""X."""\n{line}\n')])] == [2]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("worker/trainer/model.py", "import torch"),
        ("simulation/run.py", "import datasets"),
        ("coordinator/servicers/status.py", "import grpc.aio"),
        ("coordinator/server.py", "from raflora.v1 import status_pb2"),
    ],
)
def test_a_library_in_the_right_file_is_not(path: str, line: str) -> None:
    assert not _sentences(rules.outside_breaches([parse(path, line)]))


def test_an_agent_that_reaches_torch_through_another_file_is_caught() -> None:
    agent = parse("worker/agent.py", "from worker.trainer.model import load\n")
    model = parse("worker/trainer/model.py", "import json\nimport torch\n")
    assert _sentences(rules.worker_breaches([agent, model])) == [
        "worker/agent.py:1: is part of the agent, which loads no torch, "
        "but imports worker.trainer.model.load > torch (worker/trainer/model.py:2)"
    ]


def test_a_trainer_that_reaches_grpc_is_caught() -> None:
    trainer = parse("worker/trainer/process.py", "from common.channel import Tls\n")
    channel = parse("common/channel.py", "import grpc\n")
    [breach] = rules.worker_breaches([trainer, channel])
    assert "the trainer process, which speaks no gRPC" in breach.sentence


def test_a_lazy_import_does_not_count_at_the_start_but_an_eager_one_does() -> None:
    demo = parse("cli/demo.py", "import torch\n")
    lazy = parse("cli/main.py", "def f():\n    import cli.demo\n")
    eager = parse("cli/main.py", "import cli.demo\n")
    assert not _sentences(rules.start_breaches("cli/main.py", [lazy, demo], rules.HEAVY))
    assert _sentences(rules.start_breaches("cli/main.py", [eager, demo], rules.HEAVY)) == [
        "cli/main.py:1: loads cli.demo > torch (cli/demo.py:1) when it is imported"
    ]


@pytest.mark.parametrize(
    "line", ["import time", "import random", "import logging", "import numpy", "from common.errors import E"]
)
def test_an_impure_state_machine_is_caught(line: str) -> None:
    planted = parse("coordinator/federation/step.py", line)
    assert len(_sentences(rules.purity_breaches([planted]))) == 1


def test_a_pure_state_machine_is_not() -> None:
    text = "import hashlib\nfrom dataclasses import replace\nfrom coordinator.federation.state import State\n"
    step, state = parse("coordinator/federation/step.py", text), parse("coordinator/federation/state.py", "")
    assert not _sentences(rules.purity_breaches([step, state]))


def test_a_state_machine_is_as_pure_as_the_errors_that_it_imports() -> None:
    step = parse("coordinator/federation/step.py", "from common.errors import WrongRank\n")
    errors = parse("common/errors.py", "import logging\n")
    assert _sentences(rules.purity_breaches([step, errors])) == [
        "coordinator/federation/step.py:1: the state machine must not import "
        "common.errors.WrongRank > logging (common/errors.py:1)"
    ]


def test_a_circle_is_caught_even_if_one_import_hides_in_a_function() -> None:
    a = parse("common/a.py", "from common.b import x\n")
    b = parse("common/b.py", "from common import c\n")
    c = parse("common/c.py", "def f():\n    import common.a\n")
    [breach] = rules.circle_breaches([a, b, c])
    assert "a circle of imports" in breach.sentence
    assert {"common.a", "common.b", "common.c"} <= set(breach.sentence.split(": ")[1].split(" > "))
    assert not _sentences(rules.circle_breaches([a, b]))


def test_peft_keys_elsewhere_are_caught_in_f_strings_too() -> None:
    text = f'x = "{rules.PEFT_KEY_PREFIX}.lora_A"\ny = f"{rules.PEFT_KEY_PREFIX}.{{x}}"\n'
    assert [b.line for b in rules.peft_key_breaches([parse("worker/trainer/model.py", text)])] == [1, 2]
    assert not _sentences(rules.peft_key_breaches([parse("worker/peft_format.py", text)]))


@pytest.mark.parametrize("line", ["os.environ['X']", "os.getenv('X')", "from os import environ"])
def test_a_look_at_the_environment_is_caught(line: str) -> None:
    assert [b.line for b in rules.environment_breaches([parse("cli/main.py", f"import os\n{line}\n")])] == [2]
    assert not _sentences(rules.environment_breaches([parse("common/settings.py", f"import os\n{line}\n")]))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_code_that_comes_as_data_is_caught(line: str) -> None:
    assert len(_sentences(rules.unsafe_breaches([parse("worker/trainer/model.py", line)]))) == 1


def test_an_explicit_no_to_remote_code_is_allowed() -> None:
    assert not _sentences(rules.unsafe_breaches([parse("worker/trainer/model.py", "f(trust_remote_code=False)")]))


def test_long_files_and_long_functions_are_caught() -> None:
    long_file = parse("common/a.py", "x = 1\n" * (rules.MAX_FILE_LINES + 1))
    long_function = parse("common/b.py", "async def f():\n" + "    x = 1\n" * rules.MAX_FUNCTION_LINES)
    short = parse("common/c.py", "def f():\n" + "    x = 1\n" * (rules.MAX_FUNCTION_LINES - 1))
    assert _sentences(rules.length_breaches([long_file, long_function, short])) == [
        "common/a.py:1: 401 lines; at most 400 are allowed",
        "common/b.py:1: f has 61 lines; at most 60 are allowed",
    ]


def test_a_file_without_a_docstring_is_caught() -> None:
    assert [b.line for b in rules.docstring_breaches([parse("common/a.py", "x = 1\n")])] == [1]
