"""Tracking with the libraries themselves: what they are given, what a restart goes on with, and that they may fail."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.trackers import MAX_NAMES, MAX_WAITING, Run, Trackers, check_installed, destinations, leaves_this_machine
from common.tracking import TrackingConfig

SETTINGS = {"method": "raflora", "global_rank": "64"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "state").mkdir()
    return Run("clinics", "first try", tmp_path / "state", SETTINGS)


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_the_numbers_by_step(tmp_path: Path, run: Run) -> None:
    trackers = Trackers.of(TrackingConfig(tensorboard=tmp_path / "boards"), run)
    trackers.note(1, {"ranks/rho": 0.5, "federated/accuracy": 0.25, "central/loss": float("nan")})
    trackers.note(2, {"ranks/rho": 0.25})
    trackers.close()
    board = EventAccumulator(str(tmp_path / "boards" / "first try"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["federated/accuracy", "ranks/rho"]  # what is no number is left out
    assert [(event.step, event.value) for event in board.Scalars("ranks/rho")] == [(1, 0.5), (2, 0.25)]


# ---------------------------------------------------------------- MLflow


class MlflowServer:
    """The few calls of MLflow's REST interface that a run makes, over real HTTP."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}"))

            def _answer(self, body: Mapping[str, Any]) -> None:
                call = self.path.partition("?")[0].rpartition("mlflow/")[2]
                outer.calls.append((call, body))
                status, answer = outer.answer(call)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, call: str) -> tuple[int, Mapping[str, Any]]:
        if call == "experiments/get-by-name":
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
        if call == "experiments/create":
            return 200, {"experiment_id": "7"}
        if call.startswith("runs/") and call != "runs/log-batch":
            info = {"run_id": "run-1", "run_uuid": "run-1", "experiment_id": "7", "status": "RUNNING", "start_time": 1}
            run = {"info": {**info, "artifact_uri": "none", "lifecycle_stage": "active"}, "data": {}}
            return 200, {"run": run, "run_info": run["info"]}
        return 200, {}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def mlflow_server() -> Iterator[MlflowServer]:
    server = MlflowServer()
    yield server
    server.close()


def test_mlflow_gets_one_run_of_the_federation_and_a_restart_goes_on_with_it(
    run: Run, mlflow_server: MlflowServer
) -> None:
    for step in (1, 2):  # the second time as after a restart
        trackers = Trackers.of(TrackingConfig(mlflow=mlflow_server.uri), run)
        trackers.note(step, {"ranks/rho": 0.5})
        trackers.close(60.0)  # importing MLflow on a busy machine
    calls = mlflow_server.calls
    assert [body for call, body in calls if call == "experiments/create"] == [{"name": "clinics"}]
    assert [body["run_name"] for call, body in calls if call == "runs/create"] == ["first try"]
    batches = [body for call, body in calls if call == "runs/log-batch"]
    assert {p["key"]: p["value"] for p in batches[0]["params"]} == SETTINGS
    metrics = [metric for batch in batches for metric in batch.get("metrics", [])]
    assert [(m["key"], m["value"], m["step"]) for m in metrics] == [("ranks/rho", 0.5, 1), ("ranks/rho", 0.5, 2)]


def test_a_server_that_is_not_there_is_told_once_and_costs_the_run_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with capture_logs() as logged:
            trackers = Trackers.of(TrackingConfig(mlflow=nobody, tensorboard=tmp_path / "boards"), run)
            trackers.note(1, {"ranks/rho": 0.5})
            trackers.note(2, {"ranks/rho": 0.5})
            trackers.close()
    assert [(line["event"], line["library"]) for line in logged] == [("tracking has ended", "mlflow")]
    board = EventAccumulator(str(tmp_path / "boards" / "first try"))
    board.Reload()
    assert len(board.Scalars("ranks/rho")) == 2  # the other one goes on


# ---------------------------------------------------------------- Weights & Biases


def test_wandb_keeps_the_numbers_and_nothing_of_the_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers.of(TrackingConfig(wandb="team/clinics"), run)
    trackers.note(1, {"ranks/rho": 0.5})
    trackers.close(60)
    (folder,) = (run.folder / "wandb").glob("offline-run-*")
    (kept,) = folder.glob("*.wandb")
    content = _content_with(b"ranks/rho", kept)
    assert b"raflora" in content  # the settings
    for private in (str(Path.cwd()), str(run.folder.parent), "requirements.txt"):
        assert private.encode() not in content, private
    assert not [path for path in (folder / "files").rglob("*") if path.is_file()]  # the machine, packages, code


def _content_with(wanted: bytes, path: Path) -> bytes:
    """The file once the library's own process has written that much."""
    deadline = time.monotonic() + 60
    while wanted not in (content := path.read_bytes()):
        assert time.monotonic() < deadline, content[:200]
    return content


# ---------------------------------------------------------------- nobody else is told

ALONE = """
import socket, sys
from pathlib import Path
asked = set()
real = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    asked.add(str(host))
    if str(host) not in ("127.0.0.1", "localhost"):
        raise OSError("no network")
    return real(host, *rest, **more)
socket.getaddrinfo = getaddrinfo
from common.tracking import TrackingConfig
from common.trackers import Run, Trackers
folder = Path(sys.argv[1])
trackers = Trackers.of(TrackingConfig(mlflow=sys.argv[2]), Run("clinics", "one", folder))
trackers.note(1, {"ranks/rho": 0.5})
trackers.close(60.0)
print("asked:", sorted(asked))
"""


def test_the_libraries_tell_their_makers_nothing(run: Run, mlflow_server: MlflowServer) -> None:
    # In a process of its own: within pytest, and where CI is set, MLflow is silent by itself.
    root = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(run.folder), mlflow_server.uri.replace("//", "//ada:geheim@")],
        env={**kept, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["asked: ['127.0.0.1']"]  # nor is the run's address, with its password, printed
    assert any(call == "runs/log-batch" for call, _ in mlflow_server.calls)


def test_a_password_in_an_address_reaches_no_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused, capture_logs() as logged:
        unused.bind(("127.0.0.1", 0))
        trackers = Trackers.of(TrackingConfig(mlflow=f"http://ada:geheim@127.0.0.1:{unused.getsockname()[1]}"), run)
        trackers.close()
    assert [line["event"] for line in logged] == ["tracking has ended"]
    assert "geheim" not in str(logged)


# ---------------------------------------------------------------- whoever watches must not disturb


class _Sink:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.may_go_on = threading.Event()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert values
        assert self.may_go_on.wait(30)
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


def test_a_library_that_hangs_holds_nobody_up_and_what_is_too_much_is_counted() -> None:
    sink = _Sink()
    trackers = Trackers([("slow", lambda: sink)])
    for step in range(MAX_WAITING + 100):
        trackers.note(step, {"loss": 1.0})
    assert 98 <= trackers.dropped <= 100  # one note, at most two, are in the library's hands
    with capture_logs() as logged:
        trackers.close(0.01)
    assert [line["event"] for line in logged] == ["tracking is incomplete"]
    sink.may_go_on.set()


class _Names:
    def __init__(self) -> None:
        self.names: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert step >= 0
        self.names |= values.keys()

    def close(self) -> None: ...


def test_names_are_made_such_as_every_library_takes_and_are_not_without_end() -> None:
    sink = _Names()
    trackers = Trackers([("names", lambda: sink)])
    trackers.note(1, {"federated/acc@1 (top)=50%": 1.0, "../x": 1.0, "a" * 1000: 1.0})
    for step in range(20):
        trackers.note(step, {f"new {step}.{n}": 1.0 for n in range(100)})
    with capture_logs():
        trackers.close()
    assert {"federated/acc_1 _top__50_", "__/x", "a" * 200} <= sink.names
    assert len(sink.names) == MAX_NAMES
    assert trackers.dropped == 2003 - MAX_NAMES


def test_what_waits_is_handed_on_before_the_end() -> None:
    sink = _Sink()
    sink.may_go_on.set()
    trackers = Trackers([("fast", lambda: sink)])
    for step in range(100):
        trackers.note(step, {"loss": 1.0})
    trackers.close()
    assert sink.steps == [*range(100), -1]


def test_without_settings_there_is_no_thread(run: Run) -> None:
    before = threading.active_count()
    trackers = Trackers.of(TrackingConfig(), run)
    trackers.note(1, {"loss": 1.0})
    trackers.close()
    assert threading.active_count() == before


# ---------------------------------------------------------------- settings


def test_people_are_told_where_numbers_go_without_the_password() -> None:
    config = TrackingConfig(tensorboard=Path("boards"), mlflow="https://ada:secret@track.example.org:5000/x", wandb="p")
    assert destinations(config) == (
        "TensorBoard in boards (this machine)",
        "MLflow at https://track.example.org:5000/x",
        "Weights & Biases, project p",
    )


@pytest.mark.parametrize(
    ("config", "leaves"),
    [
        (TrackingConfig(), False),
        (TrackingConfig(tensorboard=Path("boards")), False),
        (TrackingConfig(mlflow="sqlite:///mlflow.db"), False),
        (TrackingConfig(mlflow="runs/mlflow"), False),
        (TrackingConfig(mlflow="file:" + "///var/mlflow"), False),
        (TrackingConfig(mlflow="file://server/share"), True),
        (TrackingConfig(mlflow="databricks"), True),
        (TrackingConfig(mlflow="databricks-uc"), True),
        (TrackingConfig(mlflow="uc:https://example.org"), True),
        (TrackingConfig(mlflow="postgresql://db.example.org/mlflow"), True),
        (TrackingConfig(mlflow="mysql+pymysql://db.example.org/mlflow"), True),
        (TrackingConfig(mlflow="https://track.example.org"), True),
        (TrackingConfig(wandb="p"), True),
    ],
)
def test_what_leaves_the_machine(config: TrackingConfig, leaves: bool) -> None:
    assert leaves_this_machine(config) is leaves


def test_what_is_installed_passes() -> None:
    check_installed(TrackingConfig(tensorboard=Path("boards"), mlflow="http://127.0.0.1:1", wandb="p"))
