"""Seeds for the requests that bring none.

A server with `--seed` draws the same for the same requests in the same order: the n-th request without a seed
gets a hash of (server's seed, n). Without `--seed` the server's seed is itself drawn at random.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets

NUM_SEEDS = 1 << 63


class RequestSeeds:
    """The sequence of one server. `next` is called once a request; its sequences count on from that."""

    def __init__(self, seed: int | None = None) -> None:
        self._key = (secrets.randbelow(NUM_SEEDS) if seed is None else seed).to_bytes(8, "little")
        self._counter = itertools.count()

    def next(self) -> int:
        """The next request's seed, 0 ≤ seed < NUM_SEEDS."""
        counter = next(self._counter).to_bytes(8, "little")
        digest = hashlib.blake2b(counter, key=self._key, digest_size=8).digest()
        return int.from_bytes(digest, "little") % NUM_SEEDS
