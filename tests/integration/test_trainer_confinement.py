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
]

SYSTEM_CALLS = (
    "trace=execve,execveat,connect,sendto,bind,openat,open,creat,openat2,rename,renameat,renameat2,unlink,unlinkat"
)


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


async def work_for_real(site: WatchedSite, *under: str) -> None:
    """Works with the real trainer, under another program if one is given."""
    config = site.config()
    model = config.model.model_copy(update={"path": str(site.folder / "model"), "device": "cpu", "offline": True})
    site.state_dir.mkdir()
    await work(
        config.model_copy(update={"model": model, "threads": 1}),
        (*under, sys.executable, "-m", "worker.trainer"),
        site.time.clock,
    )


def strangers(calls: Sequence[str], own: Sequence[Path]) -> list[str]:
    """The calls that write, name or delete anything that is not below one of our own folders; what failed did not.

    Of a call that another thread's line interrupts the outcome is not looked for: it counts as done.
    """
    found = []
    for line in calls:
        call = re.search(r"\b(openat2?|open|creat|rename\w*|unlink\w*)\((.*)(\) = \d|<unfinished)", line)
        if call is None or (call[1].startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", call[2])):
            continue
        paths = re.findall(r'"([^"]*)"', call[2])
        if not all(path == "/dev/null" or any(Path(path).is_relative_to(folder) for folder in own) for path in paths):
            found.append(line)
    return found


# torch names a cache folder after the user, and the C library asks this machine's own service for that name.
NAMES = '{sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}'


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_a_task_connects_to_nobody_executes_nothing_and_writes_in_its_own_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_site(tmp_path, monkeypatch) as site:
        trace = tmp_path / "trace"
        await work_for_real(
            site, "strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-o", str(trace), "-e", SYSTEM_CALLS
        )

        assert [update.lease_token for update in site.hostile.updates] == [1]
        assert [evaluation.lease_token for evaluation in site.hostile.evaluations] == [2]
        assert not site.hostile.has_heard(CANARY)
        assert not site.hostile.has_heard(str(tmp_path))
        calls = trace.read_text(errors="replace").splitlines()
        assert [line for line in calls if re.search(r"\bexecve(at)?\(", line)][1:] == []
        assert [line for line in calls if re.search(r"\b(connect|sendto|bind)\(", line) and NAMES not in line] == []
        assert strangers(calls, (site.state_dir, tmp_path / "tmp")) == []
        assert strangers(calls, (tmp_path / "tmp",)), "the update was written, and the trace has seen it"


@pytest.mark.parametrize(
    ("line", "is_strange"),
    [
        ('7 openat(AT_FDCWD, "/site/state/update.safetensors", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = 3', False),
        ('7 openat(AT_FDCWD, "/etc/passwd", O_RDONLY|O_CLOEXEC) = 3', False),
        ('7 openat(AT_FDCWD, "/dev/null", O_WRONLY) = 3', False),
        ('7 openat(AT_FDCWD, "/elsewhere/cache/x", O_RDWR|O_CREAT, 0666) = -1 EACCES (Permission denied)', False),
        ('7 openat(AT_FDCWD, "/elsewhere/cache/x", O_RDWR|O_CREAT, 0666) = 12', True),
        ('7 openat(AT_FDCWD, "/elsewhere/cache/x", O_RDWR|O_CREAT, 0666 <unfinished ...>', True),
        ('7 unlink("/site/data.jsonl") = 0', True),
        ('7 rename("/site/state/a", "/site/a") = 0', True),
    ],
)
def test_a_write_elsewhere_would_be_seen(line: str, is_strange: bool) -> None:
    assert strangers([line], (Path("/site/state"),)) == ([line] if is_strange else [])


async def test_a_label_that_the_data_does_not_have_tells_nobody_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_site(tmp_path, monkeypatch) as site:
        site.hostile.says["Handshake"] = asked(labels=["other", "words", "entirely"])

        with pytest.raises(TaskFailed, match=r"sad|happy|neither"):
            await work_for_real(site)

        assert site.hostile.calls == {"Handshake": 1}
