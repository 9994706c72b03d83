"""A global prompt tree: which instances hold which token prefix, how far, in which tier, at which addresses
(MemServe §Global scheduling). One tree for each role.

It is a hint: a worker's index is the truth, and whoever pulls verifies generations. Fed by what the router
itself dispatches (`hold` without addresses), by what workers tell (`hold`, `remove_blocks`), and by the
cached length in each reply (`relearn`). Pure: times are arguments, in seconds.

What is held is noted at once and entered later: before the next question at the latest, or at `settle`, which
the owner calls when nobody waits for it. So an answer need not wait until the tree knows where its KV is.

    join ──► live ──lose──► lost ──drop──► (gone)
                 lost: never routed to, but still readable, so still a source for pulls

Invariants (those of the nodes: holder_tree.py)
  * A block of a life is in one place: told anew elsewhere, it is gone from where it was.
  * What a life other than the live one of its instance says changes nothing.
  * `num_blocks`, summed over holders, is at most `max_blocks` when settled: leaves not used for longest go.
  * What is noted is entered in the order told; no question is answered, and no life ends, before it is.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from memserve.radix_tree import TOKEN_BYTES
from memserve.router.notes import Notes
from memserve.router.scheduling.holder_tree import Found, HolderTree
from memserve.router.scheduling.holders import (
    MAX_BLOCK,
    NO_SLOT,
    UNKNOWN,
    Addresses,
    Codes,
    Generations,
    Life,
    no_codes,
    no_generations,
)


class PromptTree:
    """See the module.

    Args:
        block_size: tokens a block, the same on all instances.
        max_blocks: bound on blocks, counted once for each holder.
        ttl_s: what was neither told nor used for so long is not believed any more.
    """

    def __init__(self, block_size: int, max_blocks: int, ttl_s: float = 1800.0) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.ttl_s = ttl_s
        self._nodes = HolderTree(block_size)
        self._notes = Notes()
        self._live: dict[str, Life] = {}
        self._lost: dict[str, list[Life]] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks held, counted once for each holder."""
        return self.nodes.num_blocks

    @property
    def nodes(self) -> HolderTree:
        """The tree, settled."""
        self.settle()
        return self._nodes

    @property
    def is_settled(self) -> bool:
        """Whether all that was noted is entered."""
        return not self._notes

    def settle(self) -> None:
        """Enter what was noted."""
        self._notes.settle()

    # --- lives ---

    def join(self, instance: str, incarnation: int, max_blocks: int = MAX_BLOCK) -> None:
        """An instance came up, holding nothing, of tiers of at most so many blocks. Its predecessor is lost,
        if that was not said before.

        To be told of a block beyond them raises EngineError from then on (Addresses.of says who acts on it).
        """
        before = self._live.get(instance)
        if before is not None:
            self.lose(instance, before.incarnation)
        self._live[instance] = Life(instance, incarnation, max_blocks)

    def life(self, instance: str) -> Life:
        """The life of a live instance."""
        return self._live[instance]

    def lose(self, instance: str, incarnation: int) -> None:
        """A worker died: nothing is routed to what it held, but its memory can still be read."""
        self.settle()
        life = self._live_life(instance, incarnation)
        if life is not None:
            life.is_lost = True
            del self._live[instance]
            self._lost.setdefault(instance, []).append(life)

    def drop(self, instance: str, incarnation: int) -> None:
        """Forget all that a life held: its memory is used anew, or gone. Walks the tree."""
        self.settle()
        life = self._live_life(instance, incarnation)
        if life is not None:
            del self._live[instance]
        else:
            lost = self._lost.get(instance, [])
            life = next((life for life in lost if life.incarnation == incarnation), None)
            if life is None:
                return
            lost.remove(life)
            if not lost:
                del self._lost[instance]
        self._nodes.forget(life)

    # --- what is held ---

    def hold(
        self,
        instance: str,
        incarnation: int,
        namespace: str,
        tokens: bytes,
        now: float,
        *,
        first_block: int = 0,
        addresses: Addresses | None = None,
    ) -> None:
        """An instance holds a prefix, or soon will.

        Args:
            tokens: little-endian int32, from the start of the sequence; only whole blocks count.
            first_block, addresses: where the blocks from that one on are, and the prefix ends with them. What
                comes before is there too, as all of a prefix is. None: nobody told yet; what is known stays.
        """
        life = self._live_life(instance, incarnation)
        if life is None:
            return
        if addresses is not None:
            life.reserve(addresses.codes)
        self._notes.add(partial(self._hold, life, namespace, tokens, now, first_block, addresses))

    def remove(
        self, instance: str, incarnation: int, namespace: str, tokens: bytes, from_block: int = 0
    ) -> None:
        """An instance holds of these tokens, and of whatever continues them, only the first blocks."""
        life = self._live_life(instance, incarnation)
        if life is not None:
            self._notes.add(partial(self._nodes.cut_at, life, namespace, tokens, from_block))

    def remove_blocks(self, instance: str, incarnation: int, addresses: Addresses) -> None:
        """Blocks are no longer what they were; what continues them is not reachable there any more either.

        A block that moves to the other tier is told there (`hold`) before it is removed here.
        """
        life = self._live_life(instance, incarnation)
        if life is not None:
            self._notes.add(partial(self._remove_blocks, life, addresses))

    def move_blocks(self, instance: str, incarnation: int, addresses: Addresses, moved_to: Addresses) -> None:
        """Blocks are elsewhere now, in the same order: swapped out or in, or moved together."""
        life = self._live_life(instance, incarnation)
        if life is None:
            return
        life.reserve(addresses.codes)
        life.reserve(moved_to.codes)
        self._notes.add(partial(self._move_blocks, life, addresses, moved_to))

    def relearn(
        self,
        instance: str,
        incarnation: int,
        namespace: str,
        tokens: bytes,
        num_cached_tokens: int,
        now: float,
    ) -> None:
        """A worker found so many tokens of a prompt in its cache: believe that much and no more.

        At most all tokens but the last are ever found. What the same request has stored there since must be
        told again.
        """
        life = self._live_life(instance, incarnation)
        if life is not None:
            self._notes.add(partial(self._relearn, life, namespace, tokens, num_cached_tokens, now))

    def expire(self, now: float) -> None:
        """Give up sequence ends that nobody used within the time to live."""
        self.nodes.expire(now - self.ttl_s)

    # --- queries ---

    def match(self, namespace: str, tokens: bytes, now: float) -> Found:
        """Who holds how much of a prompt. Changes nothing."""
        return self.nodes.match(namespace, tokens, now - self.ttl_s)

    def addresses(self, found: Found, life: Life, first_block: int = 0) -> Addresses:
        """Where a life has the matched blocks from `first_block` on, up to the first not known."""
        codes = self._nodes.codes(life, found)[first_block:]
        unknown = np.flatnonzero(codes == UNKNOWN)
        if len(unknown):
            codes = codes[: unknown[0]]
        return Addresses(codes, life.generations[codes])

    def num_known_tokens(self, found: Found, life: Life) -> int:
        """For how many tokens `addresses` has addresses."""
        return self._nodes.num_known(life, found) * self.block_size

    # --- inside: what was noted is entered ---

    def _hold(
        self,
        life: Life,
        namespace: str,
        tokens: bytes,
        now: float,
        first_block: int,
        addresses: Addresses | None,
    ) -> None:
        block_bytes = self._nodes.block_bytes
        num_blocks = len(tokens) // block_bytes
        codes, generations = no_codes(), no_generations()
        if addresses is not None:
            num_blocks = min(num_blocks, first_block + len(addresses.codes))
            codes = addresses.codes[: max(0, num_blocks - first_block)]
            generations = addresses.generations
        if num_blocks == 0:
            return
        tokens = tokens[: num_blocks * block_bytes]
        if len(codes):
            self._leave_old_places(life, namespace, tokens, first_block, codes, generations)
        self._nodes.believe(life, namespace, tokens, now, first_block, codes, generations)
        self._nodes.shrink(self.max_blocks)

    def _remove_blocks(self, life: Life, addresses: Addresses) -> None:
        codes, generations = addresses
        if self._nodes.take_out_end(life, codes, generations):
            return
        is_known = codes < len(life.slots)
        codes, generations = codes[is_known], generations[is_known]
        self._nodes.take_out(life, codes[life.generations[codes] == generations])

    def _move_blocks(self, life: Life, addresses: Addresses, moved_to: Addresses) -> None:
        codes, new_codes = addresses.codes, moved_to.codes
        # What was believed to be at the new places is there no more, wherever it was.
        self._nodes.take_out(life, new_codes)
        is_known = (life.slots[codes] != NO_SLOT) & (life.generations[codes] == addresses.generations)
        self._nodes.move(life, codes[is_known], new_codes[is_known], moved_to.generations[is_known])

    def _relearn(self, life: Life, namespace: str, tokens: bytes, num_cached_tokens: int, now: float) -> None:
        num_blocks = num_cached_tokens // self.block_size
        self._hold(life, namespace, tokens[: num_blocks * self._nodes.block_bytes], now, 0, None)
        findable = max(0, len(tokens) - TOKEN_BYTES) // self._nodes.block_bytes
        if num_blocks < findable:
            self._nodes.cut_at(life, namespace, tokens[: findable * self._nodes.block_bytes], num_blocks)

    # --- inside ---

    def _live_life(self, instance: str, incarnation: int) -> Life | None:
        life = self._live.get(instance)
        return life if life is not None and life.incarnation == incarnation else None

    def _leave_old_places(
        self,
        life: Life,
        namespace: str,
        tokens: bytes,
        first_block: int,
        codes: Codes,
        generations: Generations,
    ) -> None:
        """Take blocks out of where they were believed to be, unless that is where they are told to be."""
        for lost in self._lost.get(life.instance, ()):
            self._nodes.take_out(lost, codes[codes < len(lost.slots)])
        slots = life.slots[codes]
        if not slots.any():  # NO_SLOT is 0: none is placed
            return
        known = np.full(len(codes), UNKNOWN, dtype=np.int32)
        there = self._nodes.codes(life, self._nodes.find(namespace, tokens))[first_block:]
        known[: len(there)] = there
        stays = (known == codes) & (life.generations[codes] == generations[: len(codes)])
        self._nodes.take_out(life, codes[(slots != NO_SLOT) & ~stays])
