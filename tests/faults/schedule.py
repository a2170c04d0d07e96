"""Who is killed at which step: a function of the seed and nothing else, so that any run can be had again.

Every process of a federation has a list of lives. Half of them end at a step whose number is drawn; early steps are
drawn more often, because a start has many of them that a long life would hide. The other half end at a step whose name
is drawn, because a few kinds of steps are most of all steps: a kill at the rarest is as likely as one at the commonest.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

COORDINATOR = "coordinator"
LONGEST_LIFE = {COORDINATOR: 900, "": 400}  # steps; "": a worker
MOST_HITS = 12  # a name is drawn with the how-manieth time that the process comes to it
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
        names = self.names.get(key, self.names.get("", ()))
        chance = self._chance(f"{key} name", life)
        if names and chance.randrange(2):
            # Mostly the first time: some steps come once in a life, or once in a federation.
            hit = 1 if chance.randrange(2) else round(math.exp(chance.uniform(0.0, math.log(MOST_HITS))))
            # The number too: a life that never comes to that step so often must end all the same.
            plan = f"kill@{chance.choice(names)}:{hit},kill@{LONGEST_LIFE.get(key, LONGEST_LIFE[''])}"
        chance = self._chance(f"{key} full", life)
        if key == COORDINATOR and chance.randrange(REFUSED_COMMITS) == 0:
            plan += f",fail@journal.committing:{chance.randrange(1, 20)}=ENOSPC"
        return plan

    def _chance(self, key: str, life: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.federation}/{key}/{life}")  # noqa: S311 - to be had again
