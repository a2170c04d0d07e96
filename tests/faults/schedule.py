"""Who is killed at which step: a function of the seed and nothing else, so that any run can be had again.

Every process of a federation has a list of lives. Some end at a step whose number is drawn; early steps are drawn more
often, because a start has many of them that a long life would hide. The others, half of a worker's and three of four of
the coordinator's, end at a step whose name is drawn, because a few kinds of steps are most of all steps. The
coordinator's names are dealt like cards: none comes twice before every other has come once, over a whole campaign.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COORDINATOR = "coordinator"
LONGEST_LIFE = {COORDINATOR: 900, "": 400}  # steps; "": a worker
MOST_HITS = 12  # a name is drawn with the how-manieth time that the process comes to it
COMMON = ("alive.touched", "bytes.")  # drawn by number often enough: not by name
DEALT_EACH = 30  # names to the coordinator of one federation, about; the next federation goes on behind them
REFUSED_COMMITS = 6  # one life of the coordinator in so many finds its disk full at one commit


@dataclass(frozen=True)
class Schedule:
    """The lives of one federation of a campaign."""

    seed: int
    federation: int
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # steps by process, as LONGEST_LIFE

    def step_of(self, key: str, life: int) -> int:
        """At which step this life of this process ends."""
        chance = self._chance(key, life)
        longest = LONGEST_LIFE.get(key, LONGEST_LIFE[""])
        return max(1, round(math.exp(chance.uniform(0.0, math.log(longest)))))

    def plan_of(self, key: str, life: int) -> str:
        """The same as a plan of failpoints."""
        plan = f"kill@{self.step_of(key, life)}"
        names = [name for name in self.names.get(key, self.names.get("", ())) if not name.startswith(COMMON)]
        if names and self._is_by_name(key, life):
            chance = self._chance(f"{key} hit", life)
            # Mostly the first time: some steps come once in a life, or once in a federation.
            hit = 1 if chance.randrange(2) else round(math.exp(chance.uniform(0.0, math.log(MOST_HITS))))
            name = self._dealt(names, life) if key == COORDINATOR else chance.choice(names)
            # The number too: a life that never comes to that step so often must end all the same.
            plan = f"kill@{name}:{hit},kill@{LONGEST_LIFE.get(key, LONGEST_LIFE[''])}"
        chance = self._chance(f"{key} full", life)
        if key == COORDINATOR and chance.randrange(REFUSED_COMMITS) == 0:
            plan += f",fail@journal.committing:{chance.randrange(1, 20)}=ENOSPC"
        return plan

    def _is_by_name(self, key: str, life: int) -> bool:
        return self._chance(f"{key} name", life).randrange(4) < (3 if key == COORDINATOR else 2)

    def _dealt(self, names: Sequence[str], life: int) -> str:
        """The coordinator's next card: one deck after the other, each shuffled by the campaign's seed."""
        before = sum(self._is_by_name(COORDINATOR, earlier) for earlier in range(life))
        deck, place = divmod(self.federation * DEALT_EACH + before, len(names))
        cards = list(names)
        random.Random(f"{self.seed}/deck/{deck}").shuffle(cards)  # noqa: S311 - to be had again
        return cards[place]

    def _chance(self, key: str, life: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.federation}/{key}/{life}")  # noqa: S311 - to be had again
