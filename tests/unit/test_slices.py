"""Slices: made once, the same bytes for all, and never taken along by a caller that hangs up."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from coordinators import BASE_MODEL, SPEC, config_of

from common.adapter import Adapter, Factors, initial_adapter, slice_adapter
from common.codec import WireDtype, digest_of, encode
from common.errors import CorruptStore, UnknownBlob, WrongRank
from coordinator.manifest import Manifest
from coordinator.slices import MAX_FOREIGN, MAX_MAKING, Slices, read_global_adapter
from coordinator.stores.blobs import FileBlobs


class GatedBlobs(FileBlobs):
    """Counts what is put, and waits at a gate before it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts = self.most_at_once = self._at_once = 0
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)
        self._lock = threading.Lock()

    def put(self, content: bytes) -> str:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        self.waiting.release()
        assert self.gate.wait(timeout=30)
        with self._lock:
            self.puts += 1
            self._at_once -= 1
        return super().put(content)


@pytest.fixture
def blobs(tmp_path: Path) -> GatedBlobs:
    return GatedBlobs(tmp_path / "blobs")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    changes = {"adapter__scaling": "alpha_over_rank", "adapter__lora_alpha": 4.0, "adapter__wire_dtype": "bfloat16"}
    return Manifest.of(config_of(tmp_path, **changes), SPEC, BASE_MODEL)


def granted() -> set[int]:
    return {2, 4}


def trained() -> Adapter:
    start = initial_adapter(SPEC, 8, seed=3)
    noise = np.random.default_rng(5)
    modules = {
        name: Factors(f.lora_A, noise.normal(size=f.lora_B.shape).astype(np.float32))
        for name, f in start.modules.items()
    }
    return Adapter(modules, start.tensors)


async def test_a_slice_is_the_first_directions_scaled_for_its_receiver(blobs: GatedBlobs, manifest: Manifest) -> None:
    digest = blobs.put(encode(trained()))
    reference = await Slices(blobs, manifest, granted).slice_of(digest, 2)
    content = encode(slice_adapter(trained(), 2, scaling=2.0), WireDtype.BFLOAT16)
    assert (reference.digest, reference.size_bytes) == (digest_of(content), len(content))
    assert blobs.open(reference.digest).read_bytes() == content


async def test_a_slice_is_made_once_for_all_who_ask(blobs: GatedBlobs, manifest: Manifest) -> None:
    digest, slices = blobs.put(encode(trained())), Slices(blobs, manifest, granted)
    references = await asyncio.gather(*(slices.slice_of(digest, 4) for _ in range(5)))
    assert len(set(references)) == 1
    assert blobs.puts == 2


async def test_a_caller_that_hangs_up_does_not_take_the_slice_along(blobs: GatedBlobs, manifest: Manifest) -> None:
    digest, slices = blobs.put(encode(trained())), Slices(blobs, manifest, granted)
    blobs.gate.clear()
    impatient = asyncio.create_task(slices.slice_of(digest, 4))
    patient = asyncio.create_task(slices.slice_of(digest, 4))
    await asyncio.sleep(0)  # lets them ask
    impatient.cancel()
    blobs.gate.set()
    assert slices.owns((await patient).digest)
    await slices.settle()


async def test_a_slice_that_is_being_made_is_owned_only_when_it_is_there(blobs: GatedBlobs, manifest: Manifest) -> None:
    digest, slices = blobs.put(encode(trained())), Slices(blobs, manifest, granted)
    blobs.gate.clear()
    asking = asyncio.create_task(slices.slice_of(digest, 4))
    await asyncio.sleep(0)  # lets it ask
    assert slices.digests() == set()
    blobs.gate.set()
    await slices.settle()
    assert slices.digests() == {(await asking).digest}


async def test_slices_of_older_adapters_are_forgotten(blobs: GatedBlobs, manifest: Manifest) -> None:
    older, newer = blobs.put(encode(trained())), blobs.put(encode(initial_adapter(SPEC, 8, seed=4)))
    slices = Slices(blobs, manifest, granted)
    gone, kept = await slices.slice_of(older, 2), await slices.slice_of(newer, 2)
    slices.keep_only(newer)
    assert (slices.owns(gone.digest), slices.owns(kept.digest)) == (False, True)


async def test_what_cannot_be_made_is_an_error_each_time_and_not_remembered(
    blobs: GatedBlobs, manifest: Manifest
) -> None:
    slices, content = Slices(blobs, manifest, granted), encode(trained())
    with pytest.raises(UnknownBlob):
        await slices.slice_of(digest_of(content), 2)
    digest = blobs.put(content)
    assert slices.owns((await slices.slice_of(digest, 2)).digest)
    with pytest.raises(WrongRank, match="rank slice 9: the global adapter has the ranks 1 to 8"):
        await slices.slice_of(digest, 9)


def test_the_global_adapter_is_read_back(blobs: GatedBlobs, manifest: Manifest) -> None:
    adapter = trained()
    found = read_global_adapter(blobs, manifest, blobs.put(encode(adapter)))
    assert encode(found) == encode(adapter)


async def test_a_flipped_bit_in_the_global_adapter_reaches_nobody(blobs: GatedBlobs, manifest: Manifest) -> None:
    digest = blobs.put(encode(trained()))
    content = bytearray(blobs.open(digest).read_bytes())
    content[-1] ^= 1
    blobs.open(digest).write_bytes(content)
    with pytest.raises(CorruptStore, match=digest):
        await Slices(blobs, manifest, granted).slice_of(digest, 2)


async def test_only_a_few_slices_are_made_at_a_time(blobs: GatedBlobs, manifest: Manifest) -> None:
    digest, slices = blobs.put(encode(trained())), Slices(blobs, manifest, granted)
    assert blobs.waiting.acquire(timeout=30)
    blobs.gate.clear()
    asking = [asyncio.create_task(slices.slice_of(digest, rank)) for rank in range(1, 9)]
    assert await asyncio.to_thread(blobs.waiting.acquire, timeout=30)
    assert await asyncio.to_thread(blobs.waiting.acquire, timeout=30)
    blobs.gate.set()
    await asyncio.gather(*asking)
    assert blobs.most_at_once == MAX_MAKING


async def test_slices_that_nobody_trains_are_few_and_the_oldest_goes(blobs: GatedBlobs, tmp_path: Path) -> None:
    manifest = Manifest.of(config_of(tmp_path, adapter__global_rank=11), SPEC, BASE_MODEL)
    digest, dropped = blobs.put(encode(initial_adapter(SPEC, 11, seed=3))), []
    slices = Slices(blobs, manifest, granted, dropped.append)
    references = {rank: await slices.slice_of(digest, rank) for rank in (1, 2, 3, 4, *range(5, 12))}
    assert len(references) - len(granted()) == MAX_FOREIGN + 1
    assert dropped == [references[1].digest]
    assert slices.digests() == {reference.digest for rank, reference in references.items() if rank != 1}
    again = await slices.slice_of(digest, 1)
    assert (again, dropped[1:]) == (references[1], [references[3].digest])
