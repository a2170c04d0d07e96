"""Who is woken: observers by every change, a client only by one that concerns it."""

import asyncio

from rounds import ADA, BOB

from coordinator.changes import Changes

LONG_SECONDS = 30.0


def waiter(changes: Changes, client_id: str) -> asyncio.Task[None]:
    return asyncio.create_task(changes.wait_for_news(client_id, changes.version, LONG_SECONDS))


async def settled() -> None:
    """Lets everybody who can go on go on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_news_of_one_client_wake_its_polls_and_the_observers_and_nobody_else() -> None:
    changes = Changes()
    ada, ada_again, bob = waiter(changes, ADA), waiter(changes, ADA), waiter(changes, BOB)
    observer = asyncio.create_task(changes.wait(changes.version, LONG_SECONDS))
    await settled()
    changes.announce([ADA], is_for_all=False)
    await asyncio.gather(ada, ada_again, observer)
    await settled()
    assert not bob.done()
    changes.announce([], is_for_all=True)
    await bob


async def test_news_that_came_before_the_wait_are_not_missed() -> None:
    changes = Changes()
    seen = changes.version
    changes.announce([ADA], is_for_all=False)
    changes.announce([BOB], is_for_all=False)
    await changes.wait_for_news(ADA, seen, LONG_SECONDS)
    await changes.wait(seen, LONG_SECONDS)
    changes.announce([], is_for_all=True)
    await changes.wait_for_news("cem", seen + 2, LONG_SECONDS)


async def test_a_wait_ends_with_its_time_and_leaves_nothing_behind() -> None:
    changes = Changes()
    await changes.wait_for_news(ADA, changes.version, 0.0)
    given_up = waiter(changes, ADA)
    await settled()
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    assert not changes._waiting


async def test_the_end_ends_every_wait_and_those_to_come() -> None:
    changes = Changes()
    ada = waiter(changes, ADA)
    await settled()
    changes.end()
    await ada
    await changes.wait(changes.version, LONG_SECONDS)
    await changes.wait_for_news(ADA, changes.version, LONG_SECONDS)
    assert (changes.is_over, changes.version) == (True, 0)
