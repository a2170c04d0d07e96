"""The registry: who was let in, durably and one at a time, and who was shut out."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from identities import Identities, request_of

from common.certificates import Certificate, read_certificate
from common.errors import BadJoinToken, ConfigError, CorruptStore, IdentityConflict, Revoked
from common.failpoints import arm
from common.identity import Role, Subject
from common.moments import DAY_SECONDS
from coordinator.config import MAX_CERTIFICATE_DAYS
from coordinator.identity.registry import Person, Registry, Token, organisation_of


@pytest.fixture
def identities(tmp_path: Path) -> Iterator[Identities]:
    yield Identities(tmp_path / "authority")
    arm(None)


def token_of(identities: Identities, site: str, *, workers: int = 1, again: bool = False) -> Certificate:
    pem = identities.joining(site, workers=workers, again=again).certificate
    assert pem is not None
    return read_certificate(pem)


def worker(client_id: str, site: str, key_digest: str) -> Certificate:
    return Certificate(Subject(Role.WORKER, client_id, site), key_digest, 0.0, 1.0, 1)


def test_a_place_is_used_before_anybody_is_answered(identities: Identities) -> None:
    token = token_of(identities, "clinic-a")
    seen = []

    def die(step: str) -> None:
        if step == "token.used":
            seen.append(Registry(identities.folder).site("clinic-a"))
            raise KeyboardInterrupt

    arm(die)
    with pytest.raises(KeyboardInterrupt):
        identities.registry.admit(token, "k1", "")
    arm(None)
    assert seen[0] is not None
    assert seen[0].keys == {"clinic-a": "k1"}
    with pytest.raises(BadJoinToken, match="has let in its 1 worker"):
        identities.registry.admit(token, "k2", "")
    assert identities.registry.admit(token, "k1", "").name == "clinic-a"


def test_another_process_is_noticed_by_the_next_call(identities: Identities) -> None:
    token = token_of(identities, "clinic-a")
    identities.registry.admit(token, "k1", "")
    identities.registry.check(worker("clinic-a", "clinic-a", "k1"))
    Registry(identities.folder).revoke_site("clinic-a")  # the command line, say
    with pytest.raises(Revoked, match="worker clinic-a"):
        identities.registry.check(worker("clinic-a", "clinic-a", "k1"))


def test_two_that_write_at_once_lose_nothing(identities: Identities) -> None:
    token = token_of(identities, "clinic-b", workers=20)
    registries = [Registry(identities.folder) for _ in range(4)]
    threads = [threading.Thread(target=registries[i % 4].admit, args=(token, f"k{i}", f"gpu{i}")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    site = identities.registry.site("clinic-b")
    assert site is not None
    assert site.keys == {f"clinic-b.gpu{i}": f"k{i}" for i in range(20)}


@pytest.mark.parametrize(("client_id", "key"), [("clinic-b", "k1"), ("clinic-a", "k2"), ("clinic-a.gpu1", "k1")])
def test_only_the_key_that_was_let_in_under_the_name_may_call(identities: Identities, client_id: str, key: str) -> None:
    identities.registry.admit(token_of(identities, "clinic-a"), "k1", "")
    token_of(identities, "clinic-b")
    with pytest.raises(Revoked):
        identities.registry.check(worker(client_id, organisation_of(client_id), key))


def test_a_site_that_is_known_needs_a_word_before_it_gets_another_token(identities: Identities) -> None:
    old = token_of(identities, "clinic-a")
    with pytest.raises(ConfigError, match="--again"):
        identities.invite("clinic-a")
    new = token_of(identities, "clinic-a", again=True)
    with pytest.raises(BadJoinToken, match="replaced"):
        identities.registry.admit(old, "k1", "")
    assert identities.registry.admit(new, "k1", "").name == "clinic-a"


def test_a_revoked_site_begins_anew(identities: Identities) -> None:
    identities.registry.admit(token_of(identities, "clinic-a"), "k1", "")
    identities.registry.revoke_site("clinic-a")
    new = token_of(identities, "clinic-a")
    with pytest.raises(Revoked):
        identities.registry.check(worker("clinic-a", "clinic-a", "k1"))
    identities.registry.admit(new, "k2", "")
    identities.registry.check(worker("clinic-a", "clinic-a", "k2"))


def test_workers_of_one_token_cannot_take_each_others_names(identities: Identities) -> None:
    token = token_of(identities, "clinic-b", workers=3)
    identities.registry.admit(token, "k1", "gpu1")
    with pytest.raises(IdentityConflict):
        identities.registry.admit(token, "k2", "gpu1")


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "-a", "a" * 51, "ä", "a b"])
def test_a_sites_name_cannot_reach_into_another_site(identities: Identities, name: str) -> None:
    # "clinic.gpu1" as a site would have the client id of a worker of the site "clinic".
    with pytest.raises(ConfigError, match="no dot"):
        identities.invite(name)


def test_a_damaged_file_lets_nobody_in_and_is_named(identities: Identities) -> None:
    token = token_of(identities, "clinic-a")
    (identities.folder / "sites/clinic-a.json").write_text("{")
    with pytest.raises(CorruptStore, match=r"clinic-a\.json"):
        identities.registry.check(token)


def test_files_are_for_their_owner_alone(identities: Identities) -> None:
    identities.worker("clinic-a")
    identities.person("eve", Role.OBSERVER)
    for path in identities.folder.rglob("*.json"):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_people_are_let_in_and_shut_out(identities: Identities) -> None:
    registry = identities.registry
    registry.add_person(Person("eve", Role.OBSERVER, "k1"), again=False)
    registry.check(Certificate(Subject(Role.OBSERVER, "eve", "eve"), "k1", 0.0, 1.0, 1))
    with pytest.raises(Revoked):  # more than she was given
        registry.check(Certificate(Subject(Role.OPERATOR, "eve", "eve"), "k1", 0.0, 1.0, 1))
    with pytest.raises(ConfigError, match="--again"):
        registry.add_person(Person("eve", Role.OPERATOR, "k2"), again=False)
    registry.revoke_person("eve")
    with pytest.raises(Revoked):
        registry.check(Certificate(Subject(Role.OBSERVER, "eve", "eve"), "k1", 0.0, 1.0, 1))
    assert [person.is_revoked for person in registry.people()] == [True]


def test_what_nobody_knows_cannot_be_revoked(identities: Identities) -> None:
    with pytest.raises(ConfigError, match="not known"):
        identities.registry.revoke_site("nowhere")
    with pytest.raises(ConfigError, match="not known"):
        identities.registry.revoke_person("nobody")


def test_the_same_key_is_the_same_key_after_another_name(identities: Identities) -> None:
    token = token_of(identities, "clinic-b", workers=2)
    assert identities.registry.admit(token, "k1", "gpu1") == identities.registry.admit(token, "k1", "gpu2")


# ---------------------------------------------------------------- keys that were taken back


def test_no_key_of_a_revoked_site_returns_with_a_new_token(identities: Identities) -> None:
    identities.registry.admit(token_of(identities, "clinic-a"), "k1", "")
    for _ in range(2):  # nor after a second time
        identities.registry.revoke_site("clinic-a")
        token = token_of(identities, "clinic-a")
        with pytest.raises(Revoked, match="key was taken back when site clinic-a was revoked"):
            identities.registry.admit(token, "k1", "")
    assert identities.registry.admit(token, "k2", "").name == "clinic-a"


def test_a_key_is_forgotten_when_no_certificate_of_it_can_be_good(tmp_path: Path) -> None:
    identities, at = Identities(tmp_path / "authority"), [1000.0]
    registry = Registry(identities.folder, lambda: at[0])
    token = Token("1", 2, is_for_one_name=False, expires_at=2e9)
    registry.add_site("clinic-a", replace(token, keys={"clinic-a.x": "k1"}), again=False)
    registry.revoke_site("clinic-a")
    assert set(registry.add_site("clinic-a", token, again=False).taken_back) == {"k1"}
    at[0] += MAX_CERTIFICATE_DAYS * DAY_SECONDS - 1
    assert set(registry.add_site("clinic-a", token, again=True).taken_back) == {"k1"}
    at[0] += 1
    assert not registry.add_site("clinic-a", token, again=True).taken_back


def test_the_issuer_renews_nothing_that_the_registry_took_back(identities: Identities) -> None:
    pem = identities.worker("clinic-a")
    assert pem.certificate is not None
    assert pem.key is not None
    caller = read_certificate(pem.certificate)
    identities.issuer.renew(caller, request_of(pem.key))
    identities.registry.revoke_site("clinic-a")
    with pytest.raises(Revoked):
        identities.issuer.renew(caller, request_of(pem.key))
