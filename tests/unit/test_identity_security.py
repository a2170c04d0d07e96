"""From [server] to who may do what: the rules of the gate, the papers, and what a coordinator refuses to start with."""

from pathlib import Path
from typing import Any

import pytest
from identities import Identities, WallClock
from structlog.testing import capture_logs

from common.certificates import new_key, private_key, read_certificate
from common.channel import Tls
from common.errors import BadJoinToken, ConfigError, NotAllowed, NotAuthenticated
from common.identity import Role, Subject
from common.moments import DAY_SECONDS
from coordinator.config import ServerConfig
from coordinator.identity.access import authorise
from coordinator.identity.caller import Caller, own_client_id, own_enrol_key, present_caller, set_present_caller
from coordinator.identity.gate import Gate
from coordinator.identity.papers import IssuedPapers, WatchedPapers
from coordinator.identity.security import security_of
from coordinator.quiet import Quiet

STATUS = "/raflora.v1.StatusService/GetStatus"
ADA = Subject(Role.WORKER, "clinic-a.gpu1", "clinic-a")


def server(**settings: Any) -> ServerConfig:
    return ServerConfig.model_validate(settings)


def written(folder: Path, identities: Identities) -> dict[str, str]:
    key = new_key()
    subject = Subject(Role.COORDINATOR, "coordinator", "coordinator")
    pem = identities.authority.issue(subject, private_key(key).public_key(), DAY_SECONDS, ("localhost",))
    (folder / "cert.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(key)
    return {"certificate_file": str(folder / "cert.pem"), "key_file": str(folder / "key.pem")}


# ---------------------------------------------------------------- settings


def test_in_the_clear_on_loopback_the_status_says_so() -> None:
    security = security_of(server())
    assert security.sentence == "in the clear: everybody on this machine may do everything"
    assert (security.gate, security.papers, security.issuer) == (None, None, None)
    assert security.organisation_of("ada.gpu1") == "ada.gpu1"


def test_in_the_clear_elsewhere_needs_a_word_and_is_said_in_capitals() -> None:
    with pytest.raises(ConfigError, match=r"\[server.tls\] is not set.*`raflora init FOLDER`"):
        security_of(server(listen="0.0.0.0:7070"))
    sentence = security_of(server(listen="0.0.0.0:7070", insecure=True)).sentence
    assert sentence == "INSECURE: in the clear: EVERYBODY WHO REACHES THIS ADDRESS may do everything"


def test_tls_that_asks_nobody_for_a_certificate_is_as_good_as_none(tmp_path: Path) -> None:
    tls = written(tmp_path, Identities(tmp_path / "authority"))
    with pytest.raises(ConfigError, match="has no ca_file"):
        security_of(server(listen="0.0.0.0:7070", tls=tls))
    security = security_of(server(listen="0.0.0.0:7070", tls=tls, insecure=True))
    assert security.sentence.startswith("INSECURE: TLS that asks nobody")
    assert not security.asks_for_certificates
    assert security_of(server(tls=tls)).sentence.startswith("TLS that asks nobody")


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    tls, ca_file = written(tmp_path, identities), str(identities.folder / "ca.pem")
    with pytest.raises(ConfigError, match="exclude each other"):
        security_of(server(identity=identities.settings(), tls=tls))
    with pytest.raises(ConfigError, match="insecure contradicts"):
        security_of(server(identity=identities.settings(), insecure=True))
    with pytest.raises(ConfigError, match="insecure contradicts"):
        security_of(server(tls={**tls, "ca_file": ca_file}, insecure=True))


def test_an_authority_that_others_may_read_is_refused(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    assert security_of(server(identity=identities.settings())).asks_for_certificates
    identities.folder.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        security_of(server(identity=identities.settings()))


# ---------------------------------------------------------------- the gate


def test_what_the_table_does_not_name_nobody_may_call() -> None:
    for role in Role:
        with pytest.raises(NotAllowed, match="no role at all"):
            authorise(Subject(role, "eve", "eve"), "/raflora.v1.NewService/Anything")


def test_a_refusal_says_who_what_and_who_could() -> None:
    with pytest.raises(NotAllowed, match=r"^observer eve may not call Pause: that takes operator$"):
        authorise(Subject(Role.OBSERVER, "eve", "eve"), "/raflora.v1.AdminService/Pause")


def test_the_dates_count_at_every_call(tmp_path: Path) -> None:
    clock = WallClock()
    identities = Identities(tmp_path / "authority")
    eve, token = identities.person("eve", Role.OBSERVER).certificate, identities.joining("clinic-a").certificate
    assert eve is not None
    assert token is not None
    gate = Gate(identities.registry, clock)
    assert gate.admit(eve, STATUS).certificate.subject.name == "eve"
    clock.at += 366 * DAY_SECONDS
    with pytest.raises(NotAuthenticated, match="observer eve: the certificate has expired"):
        gate.admit(eve, STATUS)
    with pytest.raises(BadJoinToken, match="expired"):
        gate.admit(token, "/raflora.v1.IdentityService/Enrol")
    clock.at = 1000.0
    with pytest.raises(NotAuthenticated, match="not valid yet"):
        gate.admit(eve, STATUS)


def test_organisations_come_from_the_registry_or_from_the_certificate(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    assert Gate(identities.registry, WallClock()).organisation_of("clinic-a.gpu1.x") == "clinic-a"
    gate = Gate(None, WallClock())
    assert gate.organisation_of("nurse") == "nurse"
    pem = identities.unregistered(Subject(Role.WORKER, "nurse", "clinic-a")).certificate
    assert pem is not None
    gate.admit(pem, "/raflora.v1.FederationService/Join")
    assert gate.organisation_of("nurse") == "clinic-a"


# ---------------------------------------------------------------- the caller


async def test_the_certificate_decides_in_whose_name_a_worker_speaks(tmp_path: Path) -> None:
    assert present_caller() is None
    assert (own_client_id("bob"), own_enrol_key("k")) == ("bob", "k")  # in the clear
    pem = Identities(tmp_path / "authority").unregistered(ADA).certificate
    assert pem is not None
    certificate = read_certificate(pem)
    set_present_caller(Caller(certificate, is_registered=True))
    assert own_client_id("") == own_client_id("clinic-a.gpu1") == "clinic-a.gpu1"
    assert own_enrol_key("whatever") == f"certificate:{certificate.key_digest}"
    with pytest.raises(NotAllowed, match=r"worker clinic-a.gpu1 may not speak for client 'clinic-a.gpu2'"):
        own_client_id("clinic-a.gpu2")
    set_present_caller(Caller(certificate, is_registered=False))
    assert own_enrol_key("k") == "k"  # of two certificates of one name, the enrolment key tells them apart


# ---------------------------------------------------------------- papers


def test_the_coordinators_certificate_is_new_when_a_third_is_left(tmp_path: Path) -> None:
    clock = WallClock()
    papers = IssuedPapers(Identities(tmp_path / "authority", clock).authority, ("localhost",), 3000.0)
    first = papers()
    assert papers() is first
    clock.at += 3001.0 - 3600.0 / 3  # certificates are backdated by 600 seconds
    second = papers()
    assert second.certificate != first.certificate
    assert second.key != first.key
    assert second.authority == first.authority


def test_files_are_read_again_when_they_change_and_kept_when_they_break(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    files = written(tmp_path, identities)
    tls = Tls(identities.folder / "ca.pem", Path(files["certificate_file"]), Path(files["key_file"]))
    papers = WatchedPapers(tls)
    first = papers()
    written(tmp_path, identities)
    second = papers()
    assert second.certificate != first.certificate
    with capture_logs() as logs:
        (tmp_path / "key.pem").write_bytes(new_key())
        assert papers() == second
        assert papers() == second
        (tmp_path / "cert.pem").unlink()
        assert papers() == second
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("error", "new certificate files are not used")
    ] * 2
    written(tmp_path, identities)
    assert papers() not in (first, second)


def test_a_coordinator_does_not_start_with_files_that_do_not_fit(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    files = written(tmp_path, identities)
    (tmp_path / "key.pem").write_bytes(new_key())
    with pytest.raises(ConfigError, match="not of this key"):
        security_of(server(tls=files))


# ---------------------------------------------------------------- the log


def test_who_knocks_all_day_makes_one_line_a_minute() -> None:
    quiet = Quiet(60.0, most=2)
    assert [quiet.unsaid("eve", at) for at in (0.0, 1.0, 59.0, 61.0)] == [0, -1, -1, 2]
    assert quiet.unsaid("bob", 61.0) == 0
    assert quiet.unsaid("cem", 61.0) == 0  # eve's line makes room
    assert quiet.unsaid("eve", 62.0) == 0
