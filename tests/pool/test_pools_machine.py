"""Two or three pools under any history of everything the API offers, against a naive oracle of each.

Pulls stay under way while other things happen to both ends: a copy waits at its receiver's gate, before its
bytes are moved or after, until a step lets it pass. See pool_oracle.py for what is checked after every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from memserve.messages import Tier, Transfer
from memserve.pool.incoming import Incoming
from memserve.pool.transports.base import FailedPull
from tests.pool.pool_oracle import PoolBesideOracle, prefixes
from tests.pool.pools_alone import PoolsAlone, host_sizes, numbers

ALL = math.inf
faults = st.sampled_from([*[""] * 6, "short", "raises"])


@dataclass
class Offer:
    """A message to `target`. `values` is what the blocks at its addresses hold; `into` are the target's."""

    source: PoolBesideOracle
    target: PoolBesideOracle
    message: Transfer
    values: list[int]
    salt: str = ""
    symbols: tuple[int, ...] = ()
    into: tuple[int, ...] = ()


@dataclass
class Flight:
    """A transfer under way: of the blocks of `offer` from `skipped` on, into blocks `into`."""

    offer: Offer
    incoming: Incoming
    num_here: int
    skipped: int
    into: list[int]
    is_spoiled: bool = False

    @property
    def held(self) -> PoolBesideOracle:
        return self.offer.target

    def has_ended(self) -> bool:
        return self.incoming._pull is None or self.incoming._pull.poll() is not None


class PoolsMachine(PoolsAlone):
    def __init__(self) -> None:
        super().__init__()
        self.offers: list[Offer] = []
        self.flights: list[Flight] = []
        self.waiters: list[tuple[Offer, Incoming]] = []  # behind a flight that brings the same
        self.promised: set[tuple[str, int, int]] = set()  # addresses whose content may not change

    # --- transfers: offered ---

    def ends(self, data: st.DataObject, number: int) -> tuple[PoolBesideOracle, PoolBesideOracle]:
        """A source and a target."""
        return self.at(number), self.at(number + data.draw(st.integers(1, len(self.pools) - 1)))

    @precondition(lambda self: any(held.cached for held in self.pools))
    @rule(number=numbers, data=st.data(), first=st.sampled_from([0, 0, 0, 1, 3]))
    def offer_cached(self, number: int, data: st.DataObject, first: int) -> None:
        source, target = self.ends(data, number)
        salt, symbols = self.pick(data, source)
        message, lock = source.pool.transfer_with_insert(target.name, source.tokens(symbols), salt)
        num_blocks = source.in_device(salt, symbols)
        assert len(message.refs.blocks) == num_blocks
        assert message.tokens == source.tokens(symbols[:num_blocks])
        source.use(source.found(salt, symbols))
        symbols, first = symbols[:num_blocks], min(first, max(0, num_blocks - 1))
        if lock is not None:
            source.locks[id(lock)] = (salt, symbols)
            self.kept.append((source, lock))
        if symbols:
            message = msgspec.structs.replace(message, refs=message.refs.tail(first), first_block=first)
            values = [source.value(prefix) for prefix in prefixes(salt, symbols)[first:]]
            self.offer(data, Offer(source, target, message, values, salt, symbols))

    def offer(self, data: st.DataObject, offer: Offer) -> None:
        if data.draw(st.booleans()):
            self.offers.append(offer)
        else:
            self.receive_one(offer, data.draw(faults), data.draw(st.booleans()), 0)

    @precondition(lambda self: any(held.count(Tier.HOST) for held in self.pools))
    @rule(data=st.data())
    def offer_from_host(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([i for i, held in enumerate(self.pools) if held.count(Tier.HOST)]))
        source, target = self.ends(data, number)
        in_host = [prefix for prefix, (tier, _) in source.cached.items() if tier is Tier.HOST]
        salt, symbols = data.draw(st.sampled_from(sorted(in_host)))
        found, first = source.found(salt, symbols), source.in_device(salt, symbols)
        refs = source.pool.addresses([source.cached[prefix][1] for prefix in found[first:]], Tier.HOST)
        values = [source.value(prefix) for prefix in found[first:]]
        symbols = symbols[: len(found)]
        message = Transfer(target.name, refs, source.tokens(symbols), salt, first)
        self.offer(data, Offer(source, target, message, values, salt, symbols))

    @precondition(lambda self: self.loose)
    @rule(data=st.data(), has_room=st.booleans())
    def offer_blocks(self, data: st.DataObject, has_room: bool) -> None:
        some = data.draw(st.lists(st.sampled_from(self.loose), unique=True, min_size=1))
        source, target = self.ends(data, self.pools.index(some[0][0]))
        ids = [block for held, tier, block in some if held is source and tier is Tier.DEVICE]
        if not ids:
            return
        values = [source.own[Tier.DEVICE][block] for block in ids]
        if None in values:
            return
        into = ()
        if has_room:
            into = tuple(block for held, tier, block in self.loose if held is target and tier is Tier.DEVICE)
            into = into[: len(ids)]
        message = source.pool.transfer(target.name, ids, into or None)
        self.promised.update(self.addresses(source, ids))
        self.offer(data, Offer(source, target, message, values, into=into))

    @staticmethod
    def addresses(held: PoolBesideOracle, ids: Iterable[int]) -> set[tuple[str, int, int]]:
        generations = held.arenas[Tier.DEVICE].generations
        return {(held.name, block, int(generations[block])) for block in ids}

    # --- transfers: received ---

    @precondition(lambda self: self.offers)
    @rule(
        data=st.data(),
        fault=faults,
        waits_after=st.booleans(),
        keeps=st.booleans(),
        spare=st.integers(0, 2),
    )
    def receive(self, data: st.DataObject, fault: str, waits_after: bool, keeps: bool, spare: int) -> None:
        offer = self.offers[data.draw(st.integers(0, len(self.offers) - 1))]
        if not keeps:
            self.offers.remove(offer)
        self.receive_one(offer, fault, waits_after, spare)

    @precondition(lambda self: any(flight.offer.symbols for flight in self.flights))
    @rule(data=st.data(), fault=faults, spare=st.integers(0, 1))
    def receive_again(self, data: st.DataObject, fault: str, spare: int) -> None:
        """What is being pulled already, or the beginning of it."""
        flights = [flight for flight in self.flights if flight.offer.symbols]
        offer = data.draw(st.sampled_from(flights)).offer
        message = offer.message
        num_blocks = data.draw(st.integers(message.first_block + 1, len(offer.symbols)))
        symbols, count = offer.symbols[:num_blocks], num_blocks - message.first_block
        refs = msgspec.structs.replace(
            message.refs,
            blocks=message.refs.blocks[:count],
            generations=message.refs.generations[:count],
        )
        message = msgspec.structs.replace(message, refs=refs, tokens=offer.source.tokens(symbols))
        again = replace(offer, message=message, values=offer.values[:count], symbols=symbols)
        self.receive_one(again, fault, False, spare)

    def receive_one(self, offer: Offer, fault: str, waits_after: bool, spare: int) -> None:
        held = offer.target
        if any((held, Tier.DEVICE, block) not in self.loose for block in offer.into):
            return
        if self.promised & self.addresses(held, offer.into):
            return
        is_alone = not any(flight.held is held for flight in self.flights)
        if is_alone:
            held.gate.fault, held.gate.waits_after = fault, waits_after
        self.num_free_before = held.pool.stats().free
        incoming = held.pool.receive(offer.message, spare=spare)
        if incoming.is_waiting:
            assert any(
                each.held is held
                and each.offer.salt == offer.salt
                and each.offer.symbols[:1] == offer.symbols[:1]
                for each in self.flights
            )
            assert held.pool.stats().free == self.num_free_before
            cached = held.walk()
            held.use([p for p in prefixes(offer.salt, offer.symbols) if p in cached])
            self.waiters.append((offer, incoming))
        else:
            self.begun(offer, incoming)

    def begun(self, offer: Offer, incoming: Incoming) -> None:
        """It has ended at once, or its pull is under way."""
        held = offer.target
        held.may_evict()
        num_here = 0
        if offer.symbols:
            cached = held.walk()
            where = [cached.get(prefix, (None,))[0] for prefix in prefixes(offer.salt, offer.symbols)]
            num_here = where.count(Tier.DEVICE)
            held.use([p for p in prefixes(offer.salt, offer.symbols) if p in cached])
        if incoming._pull is None or isinstance(incoming._pull, FailedPull):
            received = incoming.poll()
            assert received is not None and received.num_blocks == 0
            all_here = num_here == len(offer.symbols) > 0
            assert (received.failure is None) == all_here
            return
        into = incoming._pull.into.tolist()
        assert offer.into or not set(into) & set(held.own[Tier.DEVICE])
        for block in offer.into:
            self.loose.remove((held, Tier.DEVICE, block))
        held.own[Tier.DEVICE].update(dict.fromkeys(into))
        skipped = len(offer.values) - len(into)
        flight = Flight(offer, incoming, num_here, skipped, into, bool(held.gate.fault))
        if offer.symbols and held.sizes.caches:
            assert num_here + len(into) == len(offer.symbols)
            held.locks[id(incoming)] = (offer.salt, offer.symbols[:num_here])
        self.flights.append(flight)
        self.settle(held)

    def settle(self, held: PoolBesideOracle) -> None:
        mine = [flight for flight in self.flights if flight.held is held]
        held.gate.settle(lambda: all(flight.has_ended() for flight in mine))

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), num_pieces=st.sampled_from([1, 1, 2, ALL]))
    def let_pass(self, data: st.DataObject, num_pieces: float) -> None:
        held = data.draw(st.sampled_from(self.flights)).held
        held.gate.let_pass(num_pieces)
        self.settle(held)
        held.gate.let_pass(0)

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), swaps=st.booleans())
    def give_up(self, data: st.DataObject, swaps: bool) -> None:
        """The source of a transfer does not wait for its end."""
        offer = data.draw(st.sampled_from(self.flights)).offer
        source = offer.source
        for held, lock in [each for each in self.kept if each[0] is source]:
            held.pool.unlock(lock)
            del held.locks[id(lock)]
        self.kept = [each for each in self.kept if each[0] is not source]
        number = self.pools.index(source)
        if swaps:
            self.swap_out(number, 8)
        elif offer.symbols:
            self.expire(number, -1)
        else:
            self.give_back([each for each in self.loose if each[0] is source])

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        flight = data.draw(st.sampled_from(self.flights))
        if not flight.has_ended():
            flight.is_spoiled = True
        flight.incoming.cancel()

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def cancel_one_that_waits(self, data: st.DataObject) -> None:
        offer, incoming = waiter = data.draw(st.sampled_from(self.waiters))
        incoming.cancel()
        received = incoming.poll()
        assert received is not None and (received.num_blocks, received.failure) == (0, "cancelled")
        self.waiters.remove(waiter)

    @precondition(lambda self: any(flight.has_ended() for flight in self.flights))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        flight = data.draw(st.sampled_from([flight for flight in self.flights if flight.has_ended()]))
        self.flights.remove(flight)
        self.end(flight)
        self.let_wait(flight.held)

    def let_wait(self, held: PoolBesideOracle) -> None:
        """Something has ended: who waited for it looks again."""
        for offer, incoming in [each for each in self.waiters if each[0].target is held]:
            self.num_free_before = held.pool.stats().free
            incoming.poll()
            cached = held.walk()
            held.use([p for p in prefixes(offer.salt, offer.symbols) if p in cached])
            if not incoming.is_waiting:
                self.waiters.remove((offer, incoming))
                self.begun(offer, incoming)

    def end(self, flight: Flight) -> None:
        held, offer = flight.held, flight.offer
        assert flight.incoming._pull is not None
        result = flight.incoming._pull.poll()
        assert result is not None
        # 1. generations never fall: what verifies still verified all the time
        if not flight.is_spoiled:
            still = offer.source.verifies(offer.message.refs.tail(flight.skipped))
            num_certain = still.index(False) if False in still else len(still)
            assert result.num_blocks >= num_certain
            assert (result.failure is None) == (result.num_blocks == len(still))
        # 2. what is verified holds what was offered
        values = offer.values[flight.skipped :]
        for block, value in zip(flight.into[: result.num_blocks], values, strict=False):
            assert (held.words(Tier.DEVICE)[block] == value).all()
        # 3. and is published, or the caller's
        for block in flight.into:
            del held.own[Tier.DEVICE][block]
        received = flight.incoming.poll()
        assert received is not None and received.num_blocks == result.num_blocks
        if offer.symbols:
            held.locks.pop(id(flight.incoming), None)
            if held.sizes.caches:
                symbols = offer.symbols[: flight.num_here + result.num_blocks]
                self.published(held, offer.salt, symbols, received.blocks)
            return
        assert received.blocks.tolist() == flight.into[: result.num_blocks]
        for index, block in enumerate(flight.into if offer.into else received.blocks.tolist()):
            held.own[Tier.DEVICE][block] = values[index] if index < result.num_blocks else None
            self.loose.append((held, Tier.DEVICE, block))

    # --- lives ---

    @rule(
        number=numbers,
        num_host=host_sizes,
        grants=st.booleans(),
        is_spared=st.sampled_from([True, True, True, False]),
    )
    def restart(self, number: int, num_host: int, grants: bool, is_spared: bool) -> None:
        """The owner dies; another takes its memory over as it is."""
        if is_spared:
            return
        held = self.at(number)
        held.close()
        self.loose = [each for each in self.loose if each[0] is not held]
        self.kept = [each for each in self.kept if each[0] is not held]
        self.sequences = [each for each in self.sequences if each.held is not held]
        self.flights = [each for each in self.flights if each.held is not held]
        self.waiters = [each for each in self.waiters if each[0].target is not held]
        self.offers = [each for each in self.offers if each.target is not held or not each.into]
        held.begin_life(num_host if Tier.HOST in held.arenas else None)
        for other in self.pools:
            if other is not held:
                other.grant_to(held)
                if grants:
                    held.grant_to(other)

    @rule(number=numbers, to=numbers, stays=st.booleans())
    def forget_a_peer(self, number: int, to: int, stays: bool) -> None:
        """Its memory is unmapped, when the pulls from it have ended; maybe it comes back."""
        source, other = self.at(number), self.at(to)
        if source is not other:
            other.pool.peers.remove(source.name)
            if not stays:
                source.grant_to(other)

    def leave(self) -> None:
        """See `PoolsAlone`; every pull ends before."""
        while self.flights:
            for held in self.pools:
                held.gate.let_pass(ALL)
                self.settle(held)
            self.finish_all()
        assert not self.waiters, "somebody waits for ever"
        super().leave()

    def finish_all(self) -> None:
        flights, self.flights = self.flights, []
        for flight in flights:
            self.end(flight)
        for held in self.pools:
            self.let_wait(held)


PoolsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
test_any_history = PoolsMachine.TestCase
