"""Commands about the cache itself: forget everything, tell what is there, another size for the host tier."""

from __future__ import annotations

from typing import Protocol

from memserve.errors import EngineError, MemoryError_
from memserve.messages import CacheCommand, CacheReport, CacheVerb
from memserve.pool.index import Match
from memserve.pool.retention import PoolStats


class Pool(Protocol):
    """What is needed of a `MemPool`."""

    @property
    def block_size(self) -> int: ...
    @property
    def host_capacity(self) -> int: ...
    def match(self, tokens: bytes, salt: str, /) -> Match: ...
    def flush(self) -> int: ...
    def resize(self, num_blocks: int, /) -> int: ...
    def stats(self) -> PoolStats: ...


class CacheAdmin:
    """Obeys `CacheCommand`s on one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def obey(self, command: CacheCommand) -> CacheReport:
        """Carry it out at once; never raises: what cannot be done is said in the report."""
        match command.verb:
            case CacheVerb.FLUSH:
                return CacheReport(command.command_id, num_blocks=self._pool.flush())
            case CacheVerb.LOOKUP:
                found = self._pool.match(command.token_ids, command.cache_salt)
                num_host_tokens = len(found.host_blocks) * self._pool.block_size
                num_device_tokens = found.num_tokens - num_host_tokens
                return CacheReport(command.command_id, num_device_tokens, num_host_tokens)
            case CacheVerb.RESIZE:
                return self._resize(command)

    def _resize(self, command: CacheCommand) -> CacheReport:
        error: str | None = None
        num_blocks = self._pool.stats().num_host
        try:
            num_blocks = self._pool.resize(command.num_host_blocks)
        except (ValueError, MemoryError_, EngineError) as reason:
            error = str(reason)
        return CacheReport(
            command.command_id,
            num_blocks=num_blocks,
            num_blocks_most=self._pool.host_capacity,
            error=error,
        )
