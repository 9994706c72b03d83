"""The descriptors without which a worker cannot start: they are waited for, and closed when all is mapped.

Grants of peers may come before and between them; these are kept for when there is a pool.
"""

from __future__ import annotations

import os

from memserve.cuda.memory import DeviceExport
from memserve.messages import ArenaGrant, DeviceGrant, Init, Tier, WeightsGrant
from memserve.pool.arena import ArenaFds
from memserve.workers.channel import GrantSocket, ReceivedGrant


class StartGrants:
    """What a worker needs to start: its arenas and, on a CPU, the weights; of an arena on a GPU the
    generation table. Peers that came early wait.
    """

    def __init__(self, init: Init, source: GrantSocket) -> None:
        config = init.config
        self.peers: list[ReceivedGrant] = []
        self._arenas: dict[Tier, ReceivedGrant] = {}
        self._weights: ReceivedGrant | None = None
        is_cpu = config.device == "cpu"
        needed = {Tier.DEVICE} if is_cpu or "cuda_ipc" in config.transports else set()
        if config.host_blocks is not None:
            needed.add(Tier.HOST)
        needs_weights = is_cpu or init.weights_manifest is not None
        while not needed <= self._arenas.keys() or (needs_weights and self._weights is None):
            for received in source.wait():
                match received.grant:
                    case ArenaGrant(instance=config.instance, tier=tier):
                        self._arenas[tier] = received
                    case DeviceGrant(instance=config.instance):
                        self._arenas[Tier.DEVICE] = received
                    case WeightsGrant():
                        self._weights = received
                    case _:
                        self.peers.append(received)

    def arena(self, tier: Tier) -> tuple[ArenaGrant, ArenaFds]:
        """The worker's own arena of a tier; the descriptors stay here."""
        received = self._arenas[tier]
        assert isinstance(received.grant, ArenaGrant)
        return received.grant, ArenaFds(*received.fds)

    def device_table(self) -> tuple[int, int]:
        """The descriptor of the table of an arena on a GPU, which stays here, and its number of blocks."""
        received = self._arenas[Tier.DEVICE]
        assert isinstance(received.grant, DeviceGrant)
        return received.fds[0], received.grant.max_blocks

    def weights(self) -> tuple[int, int]:
        """The descriptor of the weights, which stays here, and their size in bytes."""
        assert self._weights is not None
        grant = self._weights.grant
        assert isinstance(grant, WeightsGrant)
        return self._weights.fds[0], grant.num_bytes

    def gpu_weights(self) -> tuple[DeviceExport, int] | None:
        """What another worker on the same GPU has loaded, and its descriptor, the caller's from now on."""
        received, self._weights = self._weights, None
        if received is None:
            return None
        assert isinstance(received.grant, WeightsGrant) and received.grant.memory is not None
        return received.grant.memory, received.fds[0]

    def close(self) -> None:
        """Close the descriptors of arena and weights: mappings do not need them."""
        for received in (*self._arenas.values(), self._weights):
            for fd in received.fds if received is not None else ():
                os.close(fd)
