"""Random numbers by name: the same name and seed give the same numbers on every machine."""

import hashlib
from typing import Any

import numpy as np


def seeded_generator(name: str, seed: int) -> Any:
    """A named stream of random numbers: what one stream draws never changes another."""
    stream = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(stream[:16], "big")))
