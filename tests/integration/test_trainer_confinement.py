"""What the trainer process does to the machine, as the kernel sees it: one whole task of a hostile coordinator's.

It connects to nobody, executes nothing, and writes only below the state folder and the folder for temporary files.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile_coordinator import CANARY, Says, WatchedSite, watched_site, welcome
from raflora.v1 import federation_pb2 as pb
from tiny_models import MOODS, save_bert
from worker_site import RANK, evaluate, train

from common.adapter import AdapterSpec, ModuleShape, TensorShape, initial_adapter
from common.codec import encode
from worker.run import work
from worker.supervisor import TaskFailed

pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

SYSTEM_CALLS = "execve,execveat,connect,sendto,bind,openat,open,creat,openat2,rename,renameat,renameat2,unlink,unlinkat"


@asynccontextmanager
async def real_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WatchedSite]:
    """A site with a real tiny model and data full of canaries."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-environment")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    (folder / "tmp").mkdir()
    async with watched_site(folder) as site:
        save_bert(folder / "model")
        rows = [{"text": f"{CANARY} very good film {n}", "label": MOODS[n % len(MOODS)]} for n in range(20)]
        (folder / f"{CANARY}-patients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        site.hostile.says |= {"Handshake": asked(), "PollTask": tasks_of(site)}
        yield site


def asked(**changes: Any) -> Says:
    return welcome(
        **{"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "labels": MOODS} | changes
    )


def tasks_of(site: WatchedSite) -> Says:
    """A training and an evaluation of the adapter that fits the model that this worker has joined with."""
    left = [evaluate(2), train(1)]

    def answer(*_: object) -> pb.PollTaskResponse:
        if not left:
            return pb.PollTaskResponse(finished=True)
        told = site.hostile.joins[0].spec
        modules = tuple(ModuleShape(m.name, m.out_features, m.in_features) for m in told.modules)
        spec = AdapterSpec(modules, tuple(TensorShape(t.name, tuple(t.shape)) for t in told.tensors))
        content = encode(initial_adapter(spec, RANK, seed=7))
        digest = hashlib.sha256(content).hexdigest()
        site.script.blobs[digest] = content
        task = left.pop()
        task.adapter.CopyFrom(pb.BlobReference(digest=digest, size_bytes=len(content)))
        return pb.PollTaskResponse(task=task)

    return answer


async def work_traced(site: WatchedSite, trace: Path) -> None:
    """Works with the real trainer under strace."""
    config = site.config()
    model = config.model.model_copy(update={"path": str(site.folder / "model"), "device": "cpu", "offline": True})
    strace = ("strace", "-f", "-qq", "-s", "300", "-o", str(trace), "-e", f"trace={SYSTEM_CALLS}")
    site.state_dir.mkdir()
    await work(
        config.model_copy(update={"model": model, "threads": 1}),
        (*strace, sys.executable, "-m", "worker.trainer"),
        site.time.clock,
    )


def strangers(calls: Sequence[str], own: Sequence[Path]) -> list[str]:
    """The calls that write, name or delete anything that is not below one of our own folders; what failed did not."""
    found = []
    for line in calls:
        call = re.search(r"\b(openat2?|open|creat|rename\w*|unlink\w*)\((.*)\) = \d", line)
        if call is None or (call[1].startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", call[2])):
            continue
        paths = re.findall(r'"([^"]*)"', call[2])
        if not all(path == "/dev/null" or any(Path(path).is_relative_to(folder) for folder in own) for path in paths):
            found.append(line)
    return found


async def test_a_task_connects_to_nobody_executes_nothing_and_writes_in_its_own_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_site(tmp_path, monkeypatch) as site:
        trace = tmp_path / "trace"
        await work_traced(site, trace)

        assert [update.lease_token for update in site.hostile.updates] == [1]
        assert [evaluation.lease_token for evaluation in site.hostile.evaluations] == [2]
        assert not site.hostile.has_heard(CANARY)
        assert not site.hostile.has_heard(str(tmp_path))
        calls = trace.read_text(errors="replace").splitlines()
        assert [line for line in calls if re.search(r"\bexecve(at)?\(", line)][1:] == []
        assert [line for line in calls if re.search(r"\b(connect|sendto|bind)\(", line)] == []
        assert strangers(calls, (site.state_dir, tmp_path / "tmp")) == []


async def test_a_label_that_the_data_does_not_have_tells_nobody_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_site(tmp_path, monkeypatch) as site:
        site.hostile.says["Handshake"] = asked(labels=["other", "words", "entirely"])

        with pytest.raises(TaskFailed, match="sad|happy|neither"):
            await work_traced(site, tmp_path / "trace")

        assert site.hostile.calls == {"Handshake": 1}
