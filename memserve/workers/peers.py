"""Which other instances this worker can pull from, as the supervisor says by grants.

Grants come over a socket of their own and are read when they matter: before a pull, and when the loop is
idle. A peer that cannot be reached is no reason to stop: it is logged, and each pull from it is a miss.
"""

from __future__ import annotations

import logging
import os

from memserve.errors import MemserveError
from memserve.messages import ArenaGrant, DeviceGrant, PeerGrant, RevokeGrant
from memserve.pool.peers import Peers
from memserve.workers.channel import GrantSource, ReceivedGrant

logger = logging.getLogger(__name__)


class PeerGrants:
    """The grants from `source` to `instance`, for the peers of its pool."""

    def __init__(self, instance: str, source: GrantSource, peers: Peers) -> None:
        self._instance = instance
        self._source = source
        self._peers = peers

    def receive(self) -> None:
        """Take those that have come. Never waits."""
        for received in self._source.receive():
            self.take(received)

    def take(self, received: ReceivedGrant) -> None:
        """Learn of a peer's arena or of its end; owns the descriptors. Not to be mapped = a miss later."""
        grant, fds = received
        match grant:
            case ArenaGrant() if grant.instance != self._instance and len(fds) == 2:
                try:
                    self._peers.add_mapped(grant, *fds)
                except MemserveError as error:
                    logger.error("cannot map the arena of %s: %s", grant.instance, error)
            case PeerGrant() if not fds:
                try:
                    self._peers.add_sending(grant)
                except MemserveError as error:
                    logger.error("cannot pull from %s: %s", grant.instance, error)
            case DeviceGrant() if grant.instance != self._instance and 0 < len(fds) <= 2:
                try:
                    self._peers.add_device(grant, *fds)
                except MemserveError as error:
                    logger.error("cannot open the arena of %s: %s", grant.instance, error)
            case RevokeGrant():
                self._peers.remove(grant.instance, grant.tier)
            case _:
                logger.error("an unexpected %s with %d descriptors", type(grant).__name__, len(fds))
                for fd in fds:
                    os.close(fd)
