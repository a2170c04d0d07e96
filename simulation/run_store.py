"""One simulated run on disk: its settings, journal, newest adapter and, at its end, its rows.

    RUN/settings.json     what the run is; a folder of another run is refused
    RUN/journal.sqlite    every event, one commit a round; the rows follow from it alone
    RUN/blobs/            the newest global adapter, and what the method has added to the base model
    RUN/*.csv             the rows, once the run is over
    RUN/finished          written last: the digests of the rows' files
    RUN/coordinator.lock  held by the process that plays the run

A killed process loses at most the round that it was in. Nothing here trains or decides.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.codec import Layout, decode, digest_of, encode
from common.errors import ConfigError, CorruptStore, StateInUse, UnknownBlob
from common.transfer import write_durably
from coordinator.federation.events import evolve
from coordinator.federation.state import State
from coordinator.manifest import Manifest
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.event_codec import entry_of, event_of
from coordinator.stores.journal import SqlJournal
from coordinator.stores.lock import StateLock, lock_state_folder
from simulation.base_change import base_content, base_of
from simulation.federation import Advance, Standing
from simulation.local_work import BaseChange
from simulation.results import FILE_NAMES, Results, read_results, write_results
from simulation.traffic import BaseDownloads

SETTINGS_FILE = "settings.json"
FINISHED_FILE = "finished"
_SHOWN_CHARS = 80  # of a setting in a message


class RunStore:
    """A run's folder. Use it as a context: it holds the journal open."""

    def __init__(self, folder: Path, federation: str, settings: Mapping[str, Any]) -> None:
        """`settings` are plain JSON: whatever decides what the run computes.

        Raises ConfigError if the folder is of a run with other settings, StateInUse if another process plays it,
        CorruptStore if it is damaged.
        """
        self._folder = folder
        self._federation = federation
        self._sequence = 0
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.enter_context(_locked(folder))
            _claim(folder / SETTINGS_FILE, settings)
            self._blobs = FileBlobs(folder / "blobs")
            self._blobs.sweep()
            with _advising(folder):
                self._journal = SqlJournal(f"sqlite:///{folder / 'journal.sqlite'}")
            opened.callback(self._journal.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def standing(self, manifest: Manifest) -> Standing | None:
        """Where the run stands after its last committed round; None if it has not begun.

        Raises ConfigError if it was begun with another base model or other layers, CorruptStore for damage.
        """
        with _advising(self._folder):
            return self._standing(manifest)

    def _standing(self, manifest: Manifest) -> Standing | None:
        state, now, downloads = State(), 0.0, BaseDownloads()
        for entry in self._journal.read(self._federation):
            event = event_of(entry)
            downloads = downloads.after(event, state.round)
            state, now = evolve(state, event), entry.at
            self._sequence = entry.sequence
        if self._sequence == 0:
            return None
        if state.manifest_digest != manifest.digest:
            raise ConfigError(
                f"{self._folder}: this run was begun with another base model, other adapted layers or another version "
                "of raflora; name another folder for the results, or delete this one"
            )
        layout = Layout(manifest.spec, manifest.adapter.global_rank)
        content = self._blobs.verify(state.adapter_digest).read_bytes()
        measured = json.loads(state.history[-1].report_json)["simulation"] if state.history else {}
        return Standing(
            state=state,
            now=now,
            adapter=decode(content, layout, whose=f"{self._folder}: the newest adapter"),
            base=self._base(measured.get("base_digest", "")),
            downloads=downloads,
        )

    def commit(self, advance: Advance) -> None:
        """Makes a round durable: the blobs first, then all its events in one transaction."""
        standing = advance.standing
        keep = {self._blobs.put(encode(standing.adapter))}
        if standing.base:
            keep.add(self._blobs.put(base_content(standing.base)))
        entries = [
            entry_of(event, self._sequence + position, at)
            for position, (at, event) in enumerate(advance.events, start=1)
        ]
        self._journal.append(self._federation, entries)
        self._sequence += len(entries)
        for digest in self._blobs.digests() - keep:
            self._blobs.delete(digest)

    def finish(self, results: Results) -> None:
        """Writes the rows, then the mark that they are complete."""
        write_results(results, self._folder)
        write_durably(self._folder / FINISHED_FILE, json.dumps(_digests_of_rows(self._folder), indent=2).encode())

    def _base(self, digest: str) -> BaseChange:
        return base_of(self._blobs.verify(digest).read_bytes()) if digest else {}


def finished_results(folder: Path, settings: Mapping[str, Any]) -> Results | None:
    """The rows of a run that is over, or None if there is more to do. Raises ConfigError for another run's folder.

    Rows that are not those that were written count as not finished: the journal brings them back.
    """
    try:
        finished = json.loads((folder / FINISHED_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    _claim(folder / SETTINGS_FILE, settings)
    if finished != _digests_of_rows(folder):
        return None
    try:
        return read_results(folder)
    except ConfigError:
        return None  # rows as another version of raflora writes them


def _digests_of_rows(folder: Path) -> dict[str, str]:
    """By file name; a missing file has none."""
    paths = [folder / name for name in FILE_NAMES.values()]
    return {path.name: digest_of(path.read_bytes()) for path in paths if path.is_file()}


def _locked(folder: Path) -> StateLock:
    try:
        return lock_state_folder(folder)
    except StateInUse:
        raise StateInUse(
            f"{folder}: another process plays this run; wait for it, or name another folder for the results"
        ) from None


@contextmanager
def _advising(folder: Path) -> Iterator[None]:
    """What a researcher does about damage: nothing that a run has computed cannot be computed again."""
    try:
        yield
    except (CorruptStore, UnknownBlob) as error:
        raise CorruptStore(f"{error}; this run cannot go on: delete {folder} and run again") from error


def _claim(file: Path, settings: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(settings))
    if not file.is_file():
        write_durably(file, json.dumps(wanted, indent=2, sort_keys=True).encode())
        return
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        raise ConfigError(f"{file}: not what raflora wrote; delete {file.parent}, or name another folder") from None
    if found != wanted:
        key, before, now = _difference(found, wanted)
        raise ConfigError(
            f"{file.parent}: holds a run with other settings: {key} was {before}, now it is {now}; "
            "name another folder for the results, or delete this one"
        )


def _difference(found: Any, wanted: Any, key: str = "") -> tuple[str, str, str]:
    """The first setting in which two runs differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(found.keys() | wanted.keys()):
            before, now = found.get(name), wanted.get(name)
            if before != now:
                return _difference(before, now, f"{key}.{name}" if key else name)
    return key, _brief(found), _brief(wanted)


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
