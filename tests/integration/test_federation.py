"""A whole federation over real gRPC: what is published is what the method says, computed densely beside it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from coordinators import SEED, SPEC, NumpyClient, clients_of, config_of, global_adapter, observing, serving
from dense_reference import Client, raflora, truncated
from raflora.v1 import status_pb2

from common.adapter import Adapter, initial_adapter, slice_adapter
from common.codec import Layout, WireDtype, decode, digest_of, encode

RANKS = {"ada": 2, "bob": 4, "cem": 8}


def update_of(client: NumpyClient, round: int) -> Adapter:
    return decode(client.sent[round], Layout(SPEC, client.rank, client.wire_dtype), client.client_id)


def assert_is_raflora(published: Adapter, previous: Adapter, clients: Sequence[NumpyClient], round: int) -> None:
    updates = [update_of(client, round) for client in clients]
    for module in SPEC.modules:
        trained = [
            Client(
                update.modules[module.name].lora_B.astype(float),
                update.modules[module.name].lora_A.astype(float),
                client.num_examples,
                client.scalings[round],
            )
            for client, update in zip(clients, updates, strict=True)
        ]
        before, found = previous.modules[module.name], published.modules[module.name]
        dense = raflora(trained, before.lora_B.astype(float), before.lora_A.astype(float))
        np.testing.assert_allclose(found.lora_B @ found.lora_A, truncated(dense, published.rank), atol=2e-6)
    weights = [client.num_examples for client in clients]
    for tensor in SPEC.tensors:
        mean = np.average([update.tensors[tensor.name] for update in updates], axis=0, weights=weights)
        np.testing.assert_allclose(published.tensors[tensor.name], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scaling", "global_rank"),
    [
        (WireDtype.FLOAT32, "constant", 8),
        (WireDtype.FLOAT32, "alpha_over_rank", 10),  # two directions that nobody trains
        (WireDtype.BFLOAT16, "alpha_over_sqrt_rank", 8),
    ],
)
async def test_every_round_publishes_what_the_dense_reference_says(
    tmp_path: Path, dtype: WireDtype, scaling: str, global_rank: int
) -> None:
    config = config_of(
        tmp_path,
        adapter__wire_dtype=dtype,
        adapter__scaling=scaling,
        adapter__lora_alpha=3.0,
        adapter__global_rank=global_rank,
        rounds__num_rounds=3,
        rounds__evaluate_every=1,
    )
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        rounds = (await observer.status.ListRounds(status_pb2.ListRoundsRequest())).rounds
        header, fetched = await observer.fetch(4)
        final = await observer.see()
    previous = initial_adapter(SPEC, global_rank, SEED)
    for summary in rounds:
        published = global_adapter(config, summary.adapter_digest)
        assert_is_raflora(published, previous, clients, summary.round)
        for client in clients:
            # The evaluation of a round downloads the slice from which the next round trains.
            evaluated = slice_adapter(published, client.rank, scaling=client.scalings[summary.round])
            assert digest_of(client.received[summary.round]) == digest_of(encode(evaluated, dtype))
        previous = published
    assert digest_of(fetched) == header.digest
    assert fetched == encode(slice_adapter(previous, 4, scaling=header.scaling), dtype)
    assert (len(rounds), final.phase, final.adapter_digest) == (3, status_pb2.PHASE_FINISHED, rounds[-1].adapter_digest)
    assert [(e.client_id, e.metrics["accuracy"]) for e in rounds[0].evaluations] == [
        ("ada", 0.25),
        ("bob", 0.5),
        ("cem", 1.0),
    ]
    assert rounds[0].accuracy == pytest.approx((10 * 0.25 + 20 * 0.5 + 30 * 1.0) / 60)


async def test_the_first_slices_are_nested_and_seeded_by_the_coordinator(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, clients_of(address, RANKS) as clients:
        slices = {}
        for client in clients:
            slices[client.rank] = await client.download(await client.fetch_task())
    start = initial_adapter(SPEC, 8, SEED)
    assert slices == {rank: encode(slice_adapter(start, rank, scaling=1.0)) for rank in RANKS.values()}


async def test_the_bytes_do_not_depend_on_who_is_first(tmp_path: Path) -> None:
    digests = []
    for order in ([0, 1, 2], [2, 0, 1]):
        config = config_of(tmp_path / str(order), rounds__num_rounds=1)
        async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
            for i in order:
                await clients[i].do(await clients[i].fetch_task())
            digests.append((await observer.finished()).adapter_digest)
    assert digests[0] == digests[1]


async def test_a_round_that_lacks_a_rank_keeps_what_only_that_rank_trains(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__quorum=2, rounds__num_rounds=2)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        for client in clients:
            await client.do(await client.fetch_task())
        for client in clients[:2]:
            await client.do(await client.fetch_task())
        await clients[2].rpc.leave(10.0)
        status = await observer.finished()
        rounds = (await observer.status.ListRounds(status_pb2.ListRoundsRequest())).rounds
    published = [global_adapter(config, summary.adapter_digest) for summary in rounds]
    assert_is_raflora(published[1], published[0], clients[:2], 2)
    assert [(p.low, p.high, p.contributors) for p in status.last_round.partitions] == [(0, 2, 2), (2, 4, 1), (4, 8, 0)]
    assert status.last_round.partitions[2].energy_share > 0.0
    assert status.last_round.partitions[2].rounds_uncovered == 1
