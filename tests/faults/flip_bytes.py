"""Flips one seeded byte of a dead coordinator's disk, starts another on it, and looks what comes out.

Either the adapter is the one of the undisturbed run, or the coordinator refuses and says which file or entry is not
what it was. Anything else is a bug. `python -m faults.flip_bytes --trials 1000 --seed 7` in `tests/`, or:

    PYTHONPATH=.:proto:tests python tests/faults/flip_bytes.py --trials 1000 --seed 7
"""

import argparse
import asyncio
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from coordinators import CoordinatorProcess, clients_of, config_of, observing, serving, settings_of
from raflora.v1 import status_pb2

from common.errors import ConfigError, CorruptStore, Unavailable
from common.logs import set_up_logs
from common.settings import FAILPOINTS_VARIABLE
from coordinator.config import CoordinatorConfig
from coordinator.stores.journal import SqlJournal

RANKS = {"ada": 2, "bob": 4, "cem": 8}
KINDS = ("journal.sqlite-wal", "journal.sqlite", "journal.sqlite-shm", "journal.sqlite-head", "blobs", "owner.json")
NAMED = re.compile(r"journal|snapshot|blob|owner\.json|state_dir: ")
LIMIT_SECONDS = 120.0  # for one trial; a bound, not an expectation


@dataclass(frozen=True)
class Ruin:
    """The state folder of a coordinator that was killed when its last round had closed and nothing was merged yet."""

    folder: Path
    expected: str  # the adapter's digest without any fault


@dataclass(frozen=True)
class Trial:
    """One byte, and what became of it."""

    file: str
    offset: int
    flipped: int
    ended: str  # identical, refused, or what must never be
    sentence: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing was wrong in silence."""
        return self.ended in {"identical", "refused"}

    def __str__(self) -> str:
        return f"{self.file} byte {self.offset} ^ {self.flipped:#04x}: {self.ended} {self.sentence}"


async def make_ruin(folder: Path) -> Ruin:
    """Plays a round in two coordinators: one undisturbed, one killed at the merge."""
    undisturbed = config_of(folder / "undisturbed", rounds__num_rounds=1)
    async with serving(undisturbed) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        expected = (await observer.finished()).adapter_digest
    dead = folder / "dead"
    dead.mkdir()
    os.environ[FAILPOINTS_VARIABLE] = "kill@adapter.merged"
    try:
        process = CoordinatorProcess(dead, settings_of(dead, rounds__num_rounds=1))
    finally:
        del os.environ[FAILPOINTS_VARIABLE]
    try:
        async with clients_of(process.wait_until_listening(), RANKS) as clients:
            *others, last = clients
            for client in others:
                await client.do(await client.fetch_task())
            with suppress(Unavailable):  # its update closes the round, and the merge may die before the answer is sent
                await last.do(await last.fetch_task())
            await asyncio.to_thread(process.wait)
    finally:
        process.close()
    return Ruin(dead / "state", expected)


def trials(ruin: Ruin, seed: int, count: int, workplace: Path, kinds: Sequence[str] = KINDS) -> Iterator[Trial]:
    """So many seeded trials, one after the other; every kind of file gets its turn."""
    random = Random(seed)  # noqa: S311 - to be repeatable
    for number in range(count):
        yield _try(ruin, kinds[number % len(kinds)], random, workplace / "trial")


def _try(ruin: Ruin, kind: str, random: Random, folder: Path) -> Trial:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = config_of(folder, rounds__num_rounds=1, rounds__max_attempts=1)
    shutil.copytree(ruin.folder, config.state_dir)
    if kind == "journal.sqlite":  # or nearly everything would still be in its log
        SqlJournal(f"sqlite:///{config.state_dir / kind}").close()
    found = sorted(path for path in config.state_dir.rglob("*") if path.is_file() and path.stat().st_size)
    names = [path for path in found if _is_of(kind, path)]
    file = random.choice(names)
    content = bytearray(file.read_bytes())
    offset, flipped = random.randrange(len(content)), 1 << random.randrange(8)
    content[offset] ^= flipped
    file.write_bytes(content)
    ended, sentence = asyncio.run(asyncio.wait_for(_outcome(config, ruin.expected), LIMIT_SECONDS))
    return Trial(str(file.relative_to(config.state_dir)), offset, flipped, ended, sentence)


def _is_of(kind: str, path: Path) -> bool:
    if kind == "blobs":
        return path.parent.parent.name == kind
    return path.name == kind or path.name.startswith(f"{kind}-digits")


async def _outcome(config: CoordinatorConfig, expected: str) -> tuple[str, str]:
    try:
        async with serving(config) as address, observing(address) as observer:
            async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=LIMIT_SECONDS):
                status = answer.status
                if status.phase == status_pb2.PHASE_FINISHED or status.paused:
                    break
            if status.paused:
                return ("refused" if NAMED.search(status.explanation) else "refused without a name"), status.explanation
            return ("identical" if status.adapter_digest == expected else "WRONG ADAPTER"), status.adapter_digest
    except (CorruptStore, ConfigError) as error:
        return ("refused" if NAMED.search(str(error)) else "refused without a name"), str(error)
    except Exception as error:
        return "crashed", repr(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a bad trial and a table at the end; 1 if there was a bad one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    given = parser.parse_args(arguments)
    set_up_logs("text", "error", role="coordinator", federation="digits")
    counts: Counter[tuple[str, str]] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        ruin = asyncio.run(make_ruin(Path(folder)))
        kinds = (given.kind,) if given.kind else KINDS
        for number, trial in enumerate(trials(ruin, given.seed, given.trials, Path(folder), kinds)):
            counts[(trial.file.split("/")[0], trial.ended)] += 1
            if not trial.is_good:
                bad += 1
                print(f"trial {number}: {trial}", flush=True)
    for (file, ended), count in sorted(counts.items()):
        print(f"{count:6} {file:30} {ended}")
    print(f"{given.trials} trials, seed {given.seed}, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
