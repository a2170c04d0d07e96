"""A coordinator that wants more than it may have gets nothing out of a worker: the real agent, a real trainer process.

After every case nothing was heard but what the policy allows, nothing was written outside the state folder, and the
worker ended or gave the task back with a typed reason. Time is a clock that jumps, so an hour of pauses is no wait.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tiny_trainer
from hostile_coordinator import CANARY, TERMINAL, Says, WatchedSite, place, refuse, watched_site, welcome
from raflora.v1 import federation_pb2 as pb
from structlog.testing import capture_logs
from worker_site import RANK

from common.codec import Layout
from common.errors import Evicted, InvalidRequest, ProtocolTooOld
from worker.config import SitePolicy
from worker.messages import MAX_TEXT_CHARACTERS
from worker.policy import PolicyRefused

HEADER_BYTES = len(Layout(tiny_trainer.SPEC, RANK).header)
LAYERS = SitePolicy(allowed_target_modules=("q_proj", "v_proj"), allowed_modules_to_save=("classifier",))


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WatchedSite]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-environment")
    async with watched_site(tmp_path) as made:
        yield made
        made.assert_nothing_got_out()


# --- before it loads anything


@pytest.mark.parametrize(
    "said",
    [
        welcome(protocol=0),
        welcome(protocol=99),
        welcome(federation=""),
        welcome(federation="../../etc/cron.d"),
        welcome(federation=TERMINAL),
        welcome(federation="f" * 101),
        welcome(base_model_digest="../../etc/passwd"),
        welcome(base_model_digest="A" * 64),
        welcome(task="auto_map"),
        welcome(task="trust_remote_code=True"),
        welcome(task="https://evil.example/task.py"),
        welcome(task="object-detection"),
        welcome(labels=["x"] * 1_000_000),
        welcome(labels=["y" * 3_000_000]),
        welcome(labels=[f"{number:0100}" for number in range(20_000)]),
        welcome(labels=["no", "no"]),
        welcome(labels=["no", TERMINAL]),
        welcome(labels=["no", ""]),
        welcome(target_modules=["(a+)+$"]),
        welcome(target_modules=[".*"]),
        welcome(target_modules=[""]),
        welcome(target_modules=["../q_proj"]),
        welcome(target_modules=["q_proj\n"]),
        welcome(target_modules=["q" * 201]),
        welcome(target_modules=[f"layer{number}" for number in range(100_000)]),
        welcome(modules_to_save=["*"]),
        welcome(modules_to_save=[""]),
        welcome(modules_to_save=["/etc/shadow"]),
        welcome(global_rank=0),
    ],
)
async def test_what_cannot_be_meant_ends_the_worker_before_it_loads(site: WatchedSite, said: Says) -> None:
    site.hostile.says["Handshake"] = said

    with pytest.raises(InvalidRequest, match=r"^handshake: ") as refusal:
        await site.work()

    assert len(str(refusal.value)) < 500
    assert str(refusal.value).isprintable()
    assert_only_the_handshake_was_heard(site, "protocol_unsupported", "invalid_request")


@pytest.mark.parametrize(
    ("said", "policy", "sentence"),
    [
        (welcome(), SitePolicy(allowed_federations=("hospitals",)), "federation 'scripted'; .* allows hospitals"),
        (welcome(), SitePolicy(allowed_federations=()), "federation 'scripted'; .* allows none"),
        (welcome(), SitePolicy(allowed_tasks=("image-classification",)), "task 'sequence-classification'"),
        (welcome(base_model_digest="bad0" * 16), SitePolicy(allowed_base_models=("a" * 64,)), "base model bad0bad0bad"),
        (welcome(target_modules=["q_proj", "lm_head"]), LAYERS, "target_modules 'lm_head'"),
        (welcome(target_modules=["embed_tokens"]), LAYERS, "target_modules 'embed_tokens'"),
        (welcome(target_modules=["all-linear"]), LAYERS, "target_modules 'all-linear'"),
        (welcome(target_modules=["xq_proj"]), LAYERS, "target_modules 'xq_proj'"),
        (welcome(modules_to_save=["bert"]), LAYERS, "modules_to_save 'bert'; .* allows classifier"),
        (welcome(modules_to_save=["pre_classifier"]), LAYERS, "modules_to_save 'pre_classifier'"),
    ],
)
async def test_what_the_site_does_not_allow_ends_the_worker_before_it_loads(
    site: WatchedSite, said: Says, policy: SitePolicy, sentence: str
) -> None:
    site.hostile.says["Handshake"] = said

    with pytest.raises(PolicyRefused, match=f"^site policy: .*{sentence}"):
        await site.work(policy)

    assert_only_the_handshake_was_heard(site, "policy_refused")


def assert_only_the_handshake_was_heard(site: WatchedSite, *reasons: str) -> None:
    assert site.hostile.calls == {"Handshake": 1}
    (request,) = site.hostile.heard
    assert {field.name for field, _ in pb.HandshakeRequest.FromString(request).ListFields()} == {
        "protocol_min",
        "protocol_max",
        "software_version",
    }
    assert not (site.folder / "pid").exists(), "no trainer was started"
    assert not (site.state_dir / "egress.jsonl").exists(), "nothing left that would have to be listed"
    (refusal,) = map(json.loads, site.refusals().splitlines())
    assert refusal["reason"] in reasons


@pytest.mark.parametrize(
    "base_model",
    ["/etc/passwd", "https://evil.example/model", "evil/auto_map --trust_remote_code", "../../model", TERMINAL],
)
async def test_a_base_model_is_a_name_for_people_and_nothing_is_loaded_by_it(
    site: WatchedSite, base_model: str
) -> None:
    site.hostile.says["Handshake"] = welcome(base_model=base_model)
    with capture_logs() as logs:
        await site.work()
    assert str(site.folder) in json.loads(sent_to_the_trainer(site))["model"]["path"]
    assert base_model not in sent_to_the_trainer(site)
    assert all(str(value).isprintable() for line in logs for value in line.values())


def sent_to_the_trainer(site: WatchedSite) -> str:
    return site.config().model_dump_json()


# --- between loading and the first task


async def test_a_join_tells_the_documented_profile_and_nothing_else(site: WatchedSite) -> None:
    await site.work()

    (join,) = site.hostile.joins
    told = {field.name for field, _ in join.ListFields()}
    assert told == {"protocol", "client_id", "enrol_key", "profile", "base_model_digest", "spec", "software_version"}
    profile = {field.name: value for field, value in join.profile.ListFields()}
    told_of_data = {"num_examples": 40, "num_eval_examples": 40}
    assert profile == {"max_rank": RANK, "device": "cpu", "memory_bytes": 1 << 30, **told_of_data}


@pytest.mark.parametrize(
    "said",
    [
        place(heartbeat_seconds=0.0),
        place(heartbeat_seconds=-1.0),
        place(heartbeat_seconds=math.nan),
        place(heartbeat_seconds=math.inf),
        place(manifest_digest="../../etc/passwd"),
        place(manifest_digest=TERMINAL),
        place(wire_dtype="pickle"),
    ],
)
async def test_a_place_that_cannot_be_meant_ends_the_worker(site: WatchedSite, said: Says) -> None:
    site.hostile.says["Join"] = said

    with pytest.raises(InvalidRequest, match=r"^join: "):
        await site.work()

    assert site.hostile.calls == {"Handshake": 1, "Join": 1}
    assert "invalid_request" in site.refusals()


async def test_a_manifest_that_the_site_does_not_allow_ends_the_worker(site: WatchedSite) -> None:
    with pytest.raises(PolicyRefused, match="manifest 'fed0fed0"):
        await site.work(SitePolicy(allowed_manifests=("a" * 64,)))
    assert site.hostile.calls == {"Handshake": 1, "Join": 1}


async def test_a_site_with_too_few_examples_does_not_even_join(site: WatchedSite) -> None:
    with pytest.raises(PolicyRefused, match="40 training examples, but min_examples is 41"):
        await site.work(SitePolicy(min_examples=41))
    assert site.hostile.calls == {"Handshake": 1}


async def test_no_sentence_reaches_the_log_as_it_came(site: WatchedSite) -> None:
    sentence = TERMINAL * 1000
    site.hostile.says["Join"] = place(status_sentence=sentence)
    site.hostile.says["PollTask"] = lambda *_: pb.PollTaskResponse(finished=True, status_sentence=sentence)
    with capture_logs() as logs:
        await site.work()
    words = [str(value) for line in logs for value in line.values()]
    assert all(value.isprintable() for value in words)
    assert max(map(len, words)) <= MAX_TEXT_CHARACTERS + len("...")


async def test_the_words_of_an_error_are_cleaned_too(site: WatchedSite) -> None:
    site.hostile.says["PollTask"] = lambda _, context: refuse(context, Evicted(TERMINAL))

    with pytest.raises(Evicted) as evicted:
        await site.work()
    assert str(evicted.value).isprintable()


async def test_a_coordinator_that_never_answers_is_asked_with_patience(site: WatchedSite) -> None:
    silent, honest = asyncio.Event(), welcome()

    async def twice_nothing(*_: object) -> Any:
        if site.hostile.calls["Handshake"] < 3:
            await silent.wait()
        del site.hostile.says["Handshake"]
        return honest(None, None)

    site.hostile.says["Handshake"] = twice_nothing
    config = site.config()
    impatient = config.coordinator.model_copy(update={"rpc_timeout_seconds": 0.2})

    await site.work_as(config.model_copy(update={"coordinator": impatient}))

    assert site.hostile.calls["Handshake"] == 3
    assert len(site.time.pauses) >= 2


async def test_a_protocol_of_the_future_says_so(site: WatchedSite) -> None:
    site.hostile.says["Handshake"] = welcome(protocol=2)
    with pytest.raises(ProtocolTooOld, match="protocol 2, but this worker speaks 1 to 1"):
        await site.work()
