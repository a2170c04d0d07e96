"""The sites and people of a federation, as small files: who was let in, with which key, and who was shut out.

One JSON file each, written durably under a lock, so the command line and a running coordinator may both change them.
A file is read again as soon as it is another one: a revocation is noticed by the next call.

    authority/sites/clinic-a.json    authority/people/eve.json
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.certificates import Certificate
from common.errors import BadJoinToken, ConfigError, CorruptStore, IdentityConflict, InvalidRequest, Revoked, TooBusy
from common.failpoints import reach
from common.file_mark import NO_FILE, Mark, mark_of
from common.identity import Role, Subject, is_name
from common.moments import DAY_SECONDS
from common.transfer import shortage_of, sweep_parts, write_durably
from coordinator.config import MAX_CERTIFICATE_DAYS

MAX_WORKERS = 10_000  # of one token
MAX_TAKEN_BACK = 2 * MAX_WORKERS  # of one site that are remembered, the newest
_LOCK_FILE = "registry.lock"
_LOCK_SECONDS = 10.0  # it is held for milliseconds
_PRIVATE = 0o600


@dataclass(frozen=True)
class Token:
    """The newest join token of a site; an older one is worth nothing."""

    serial: str  # of its certificate, hex
    workers: int  # how many keys it lets in
    is_for_one_name: bool  # the client id is the site's name, not SITE.WORKER
    expires_at: float  # unix seconds
    keys: Mapping[str, str] = field(default_factory=dict)  # what it let in: client id to key digest

    @property
    def is_used_up(self) -> bool:
        """Whether it lets nobody new in."""
        return len(self.keys) >= self.workers


@dataclass(frozen=True)
class Site:
    """An organisation with workers."""

    name: str
    token: Token
    keys: Mapping[str, str] = field(default_factory=dict)  # who may call: client id to key digest
    is_revoked: bool = False
    taken_back: Mapping[str, float] = field(default_factory=dict)  # key digest to unix seconds: let in by no new token


@dataclass(frozen=True)
class Person:
    """Somebody who looks on or operates."""

    name: str
    role: Role
    key_digest: str
    is_revoked: bool = False


Entry = TypeVar("Entry", Site, Person)


class Registry:
    """The files of one authority. Every method reads the disk; call the writing ones from a thread."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._now = now
        self._sites = _Shelf(folder / "sites", _site_of)
        self._people = _Shelf(folder / "people", _person_of)

    # ------------------------------------------------------------ asking

    def check(self, certificate: Certificate) -> None:
        """Raises Revoked or BadJoinToken unless this certificate's key is one that was let in and not taken back."""
        subject = certificate.subject
        match subject.role:
            case Role.JOIN:
                self._check_token(certificate)
            case Role.WORKER:
                site = self._sites.read(subject.organisation)
                known = site.keys.get(subject.name) if site and not site.is_revoked else None
                _check_key(certificate, known, is_taken_back=site is not None and site.is_revoked)
            case Role.OBSERVER | Role.OPERATOR:
                person = self._people.read(subject.name)
                is_in = person is not None and not person.is_revoked and person.role is subject.role
                known = person.key_digest if person and is_in else None
                _check_key(certificate, known, is_taken_back=person is not None and person.is_revoked)
            case Role.COORDINATOR:
                _check_key(certificate, None)  # serves, never calls

    def knows(self, client_id: str) -> bool:
        """Whether somebody may call by this name: its site is not revoked and has let a key of it in."""
        site = self._sites.read(organisation_of(client_id))
        return site is not None and not site.is_revoked and client_id in site.keys

    def sites(self) -> list[Site]:
        """All, by name."""
        return self._sites.all()

    def people(self) -> list[Person]:
        """All, by name."""
        return self._people.all()

    def site(self, name: str) -> Site | None:
        """One, if it was ever added."""
        return self._sites.read(name)

    def person(self, name: str) -> Person | None:
        """One, if it was ever added."""
        return self._people.read(name)

    # ------------------------------------------------------------ changing

    def add_site(self, name: str, token: Token, *, again: bool) -> Site:
        """Gives a site its token. Raises ConfigError if it has one already, unless it was revoked or `again` is set.

        A revoked site begins anew: none of its earlier keys comes back.
        """
        check_site_name(name)
        with self._locked():
            known = self._sites.read(name)
            if known is not None and not known.is_revoked and not again:
                raise ConfigError(
                    f"site {name} is known; --again gives it a new token in place of the old one and keeps its "
                    f"workers, `raflora site revoke {name} --folder FOLDER` shuts them out"
                )
            keys = known.keys if known is not None and not known.is_revoked else {}
            site = Site(name, token, keys, taken_back=self._taken_back(known) if known is not None else {})
            self._sites.write(name, site)
            return site

    def add_person(self, person: Person, *, again: bool) -> None:
        """Lets somebody in, with this key alone. Raises ConfigError if the name is in already, but for `again`.

        The same person with the same key again changes nothing.
        """
        with self._locked():
            if self._people.read(person.name) != person:
                self.check_is_new(person.name, again=again)
                self._people.write(person.name, person)

    def check_is_new(self, name: str, *, again: bool) -> None:
        """Raises ConfigError if a person of this name is in already, but for `again`."""
        check_name(name)
        known = self._people.read(name)
        if known is not None and not known.is_revoked and not again:
            raise ConfigError(f"{known.role} {known.name} is known; --again gives a new identity for the old one")

    def revoke_site(self, name: str) -> Site:
        """Takes back its token and the identities of all its workers. Raises ConfigError if nobody knows it."""
        with self._locked():
            known = self._sites.read(name)
            if known is None:
                raise ConfigError(f"site {name[:100]!r} is not known; `raflora site list --folder FOLDER` shows them")
            revoked = replace(known, is_revoked=True)
            self._sites.write(name, revoked)
            return revoked

    def revoke_person(self, name: str) -> Person:
        """Takes an observer's or operator's identity back. Raises ConfigError if nobody knows it."""
        with self._locked():
            known = self._people.read(name)
            if known is None:
                raise ConfigError(f"{name[:100]!r} is not known; `raflora access list --folder FOLDER` shows everybody")
            revoked = replace(known, is_revoked=True)
            self._people.write(name, revoked)
            return revoked

    def admit(self, token: Certificate, key_digest: str, worker: str) -> Subject:
        """Uses a place of a join token for this key, durably, and says who it is now.

        The same key again changes nothing. Raises BadJoinToken, Revoked, IdentityConflict or InvalidRequest.
        """
        with self._locked():
            site = self._check_token(token)
            admitted = {key: client_id for client_id, key in site.token.keys.items()}
            if key_digest in admitted:
                return Subject(Role.WORKER, admitted[key_digest], site.name)
            if key_digest in site.taken_back:
                raise Revoked(
                    f"this worker's key was taken back when site {site.name} was revoked; it takes a new one, "
                    "which the worker makes by itself"
                )
            client_id = _client_id(site, worker)
            if site.token.is_used_up:
                raise BadJoinToken(
                    f"the join token of site {site.name} has let in its {site.token.workers} worker(s); "
                    f"the operator can make a new one: raflora site add {site.name} --again --folder FOLDER"
                )
            if client_id in site.token.keys:
                raise IdentityConflict(
                    f"another worker of site {site.name} came in as {client_id} with this join token; "
                    "give every worker a name of its own"
                )
            keys = {**site.token.keys, client_id: key_digest}
            self._sites.write(
                site.name,
                replace(site, token=replace(site.token, keys=keys), keys={**site.keys, client_id: key_digest}),
            )
            reach("token.used")
            return Subject(Role.WORKER, client_id, site.name)

    def _check_token(self, certificate: Certificate) -> Site:
        name = certificate.subject.organisation
        site = self._sites.read(name)
        if site is None:
            raise BadJoinToken(f"this join token is for site {name}, which this federation does not know")
        if site.is_revoked:
            raise Revoked(f"site {name} was revoked by the operator; it takes a new join token")
        if site.token.serial != serial_of(certificate):
            raise BadJoinToken(f"this join token of site {name} was replaced by a newer one")
        return site

    def _taken_back(self, site: Site) -> Mapping[str, float]:
        """The keys that must not return, each until no certificate of it can be good any more."""
        now = self._now()
        found = {key: until for key, until in site.taken_back.items() if until > now}
        if site.is_revoked:
            until = now + MAX_CERTIFICATE_DAYS * DAY_SECONDS
            found |= dict.fromkeys([*site.keys.values(), *site.token.keys.values()], until)
        return dict(list(found.items())[-MAX_TAKEN_BACK:])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One reader and writer at a time, of all processes and threads. Raises TooBusy."""
        descriptor = os.open(self._folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
        try:
            _lock(descriptor)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    gives_up_at = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= gives_up_at:
                raise TooBusy("another process holds the registry of identities; try again in a minute") from None
            time.sleep(0.01)


class _Shelf(Generic[Entry]):
    """A folder of entries, each read once for each time that it was written."""

    def __init__(self, folder: Path, parse: Callable[[dict[str, Any]], Entry]) -> None:
        self._folder = folder
        self._parse: Callable[[dict[str, Any]], Entry] = parse
        self._known: dict[str, tuple[Mark, Entry]] = {}

    def read(self, name: str) -> Entry | None:
        """Raises CorruptStore if it cannot be read, so that nobody is let in by mistake; TooBusy if not now."""
        if not is_name(name):
            return None
        path = self._path(name)
        try:
            mark = mark_of(path)  # before its content: what changes in between is read again by the next call
            known = self._known.get(name)
            if known is None or known[0] != mark or mark == NO_FILE:
                entry: Entry = self._parse(json.loads(path.read_bytes()))
                known = self._known[name] = (mark, entry)
            return known[1]
        except FileNotFoundError:
            self._known.pop(name, None)
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            if shortage := shortage_of(error):
                raise TooBusy(f"{path.name}: {shortage}; try again later") from None
            raise CorruptStore(f"{path}: cannot be read, so nobody is let in by it: {type(error).__name__}") from None

    def write(self, name: str, entry: Entry) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        sweep_parts(self._folder)  # of a writer that died: the lock is held, so nobody else writes
        content = json.dumps(asdict(entry), indent=1).encode() + b"\n"
        write_durably(self._path(name), content, mode=_PRIVATE)

    def all(self) -> list[Entry]:
        entries = (self.read(path.stem) for path in sorted(self._folder.glob("*.json")))
        return [entry for entry in entries if entry is not None]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def serial_of(certificate: Certificate) -> str:
    """As a token keeps it."""
    return f"{certificate.serial:x}"


def check_name(name: str) -> None:
    """Of a person. Raises ConfigError."""
    if not is_name(name):
        raise ConfigError(f"{name[:100]!r}: a name has letters, digits, dots and dashes, at most 100")


def check_site_name(name: str) -> None:
    """Raises ConfigError. A dot parts the site from the worker in a client id, so a site's name has none."""
    if not is_name(name) or "." in name or len(name) > 50:
        raise ConfigError(f"site {name[:100]!r}: a name has letters, digits and dashes, at most 50, and no dot")


def organisation_of(client_id: str) -> str:
    """The site behind a client id that this registry gave out."""
    return client_id.partition(".")[0]


def _client_id(site: Site, worker: str) -> str:
    if site.token.is_for_one_name:
        return site.name
    client_id = f"{site.name}.{worker}"
    if not is_name(worker) or not is_name(client_id):
        raise InvalidRequest(
            f"worker {worker[:100]!r}: site {site.name} has several, so each needs a name of letters, digits, dots "
            "and dashes, at most 49 (`name` in its settings, or its host name)"
        )
    return client_id


def _check_key(certificate: Certificate, known: str | None, *, is_taken_back: bool = False) -> None:
    if known == certificate.key_digest:
        return
    if is_taken_back:
        raise Revoked(f"{certificate.subject}: the operator took this identity back; it takes a new one to come in")
    raise Revoked(f"{certificate.subject}: no such key is let in by this name; it takes a new join token to come in")


def _site_of(fields: dict[str, Any]) -> Site:
    return Site(**{**fields, "token": Token(**fields["token"])})


def _person_of(fields: dict[str, Any]) -> Person:
    return Person(**{**fields, "role": Role(fields["role"])})
