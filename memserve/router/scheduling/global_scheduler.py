"""The global scheduler (MemServe §Global scheduling): what is believed of every worker's cache and load, and
the choice of workers for a request.

    join, leave           a worker's life begins and ends
    place                 match the prompt trees, price every worker, choose (policies/)
    started               what was chosen is believed from now on: the prompt to be there, the work queued
    computed, prefilled, left    and is corrected by what comes back
    stored, moved, held   addresses as workers tell them

Pure like the dispatcher that owns it: times are arguments. Trees are hints, one for each role; a worker's
index is the truth. Cost models come from calibration (`use`), until then from a rough guess.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import msgspec

from memserve.config import Role, Transport
from memserve.errors import EngineError
from memserve.messages import BlockRefs, CachedTokens, Offer
from memserve.router.fleet import Seat
from memserve.router.notes import Notes
from memserve.router.request_state import RequestState
from memserve.router.scheduling.cost_model import CostModel
from memserve.router.scheduling.hardware import rough_guess
from memserve.router.scheduling.holders import Addresses
from memserve.router.scheduling.load import Backlog, RecentWork
from memserve.router.scheduling.policies.decision import Ask, Candidate, Decision, PrefillRow, Source
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.router.scheduling.policies.pricing import source_of
from memserve.router.scheduling.policy import WorkerView
from memserve.router.scheduling.predictor import Batch, Correction, Phase, Predictor
from memserve.router.scheduling.prompt_tree import PromptTree

# Blocks that a tree may hold, summed over holders: some 100 MB beside the token ids.
MAX_TREE_BLOCKS = 1 << 20
# How long the memory of a dead worker is worth looking at.
LOST_S = 120.0


@dataclass(slots=True)
class _Worker(Candidate):
    """A live worker, with what it has been given."""

    backlog: Backlog = field(default_factory=Backlog)
    stepped_at: float | None = None
    stepped_rows: int = 0


class GlobalScheduler:
    """See the module.

    Args:
        policy: by name, for requests that ask for no other.
        seed: of the random choices.
        reach: how each instance gets KV from each other; None = all map all. What is not there cannot be had.
    """

    def __init__(
        self,
        policy: str = "least-load",
        *,
        seed: int = 0,
        reach: Mapping[str, Mapping[str, Transport]] | None = None,
        max_blocks: int = MAX_TREE_BLOCKS,
    ) -> None:
        self._reach = reach
        self.policy = policy
        self._max_blocks = max_blocks
        self._rng = random.Random(seed)
        self._turn = 0
        self._models: Mapping[str, CostModel] = {}
        self._corrections: dict[str, Correction] = {}
        self._trees: dict[Role, PromptTree] = {}
        self._workers: dict[str, _Worker] = {}
        self._recent: dict[Role, RecentWork] = {}
        self._lost: list[tuple[float, Role, str, int]] = []
        self._notes = Notes()

    def use(self, models: Mapping[str, CostModel]) -> None:
        """Predict by these from now on; by instance."""
        self._notes.settle()
        self._models = models
        for name, worker in self._workers.items():
            if name in models:
                worker.predictor = Predictor(models[name])

    # --- lives ---

    def join(self, view: WorkerView) -> None:
        """A worker came up, with an empty cache."""
        name = view.instance
        model = self._models.get(name) or rough_guess(view.kv_token_bytes)
        correction = self._corrections.setdefault(name, Correction())
        self._workers[name] = _Worker(view, Predictor(model), correction)
        max_blocks = max(view.num_blocks, view.max_host_blocks)
        self._tree(view.role, view.block_size).join(name, view.incarnation, max_blocks)
        self._recent.setdefault(view.role, RecentWork()).join(name)

    def leave(self, view: WorkerView, now: float) -> None:
        """A worker is dead: what it held is no place to route to, but can be pulled for a while."""
        del self._workers[view.instance]
        self._recent[view.role].leave(view.instance)
        self._trees[view.role].lose(view.instance, view.incarnation)
        self._lost.append((now, view.role, view.instance, view.incarnation))

    def tick(self, now: float) -> None:
        """Time passes."""
        for tree in self._trees.values():
            tree.expire(now)
        while self._lost and self._lost[0][0] < now - LOST_S:
            _, role, instance, incarnation = self._lost.pop(0)
            self._trees[role].drop(instance, incarnation)

    @property
    def is_settled(self) -> bool:
        """Whether all that was told is entered."""
        return not self._notes and all(tree.is_settled for tree in self._trees.values())

    def settle(self) -> None:
        """Enter what was told, while nobody waits."""
        self._notes.settle()
        for tree in self._trees.values():
            tree.settle()

    # --- requests ---

    def place(self, request: RequestState, now: float) -> Decision | None:
        """Where a request goes, with the whole table of why; None = nothing has room."""
        if not self._has_room(request):
            return None
        self._notes.settle()
        tokens = request.token_bytes()
        found = {role: tree.match(request.cache_salt, tokens, now) for role, tree in self._trees.items()}
        sources = [source_of(self._trees[role], each) for role, each in found.items()]
        workers = list(self._workers.values())
        for worker in workers:
            worker.view.queue_ms = worker.backlog.queue_ms(now)
        for recent in self._recent.values():
            for name, ms in recent.items():
                self._workers[name].view.recent_ms = ms
        both = found.get(Role.COLOCATED)
        ask = Ask(
            num_tokens=len(request.tokens),
            num_new_tokens=request.num_decode_tokens - len(request.tokens),
            rng=self._rng,
            turn=self._turn,
            session=request.session,
            prefill_found=found.get(Role.PREFILL, both),
            decode_found=found.get(Role.DECODE, both),
            source=max(
                (each for each in sources if each is not None and self._is_reached(each)),
                key=lambda each: each.num_tokens,
                default=None,
            ),
        )
        return POLICIES[request.policy or self.policy](workers, ask)

    def started(self, request: RequestState, decision: Decision, now: float) -> None:
        """The request was dispatched as decided."""
        self._turn += 1
        row = decision.prefill
        worker = self._workers[row.instance]
        worker.backlog.add(request.request_id, row.exec_ms + row.swap_in_ms, now)
        self._recent[worker.view.role].add(row.instance, row.exec_ms)
        # The decode side is believed when it tells its own blocks: there is nothing to be had there before.
        seat = request.prefill or request.decode
        assert seat is not None
        tokens = request.token_bytes(0, len(request.tokens) - 1)
        self._believe(seat.instance, seat.incarnation, request.cache_salt, tokens, now)

    def offer_of(self, request: RequestState, row: PrefillRow, now: float) -> Offer | None:
        """KV that the prefill worker is to pull from the row's source; None if there is nothing to pull."""
        source = row.source
        if source is None or request.sampling.prompt_logprobs is not None:
            return None
        tokens = request.token_bytes(0, len(request.tokens) - 1)
        for tree in self._trees.values():
            found = tree.match(request.cache_salt, tokens, now)
            for holding in (*found.live.values(), *found.lost):
                life = holding.life
                if (life.instance, life.incarnation) != (source.instance, source.incarnation):
                    continue
                num_blocks = row.num_cached_tokens // tree.block_size  # with what is to be pulled
                wanted = tree.addresses(found, life).first(num_blocks)
                refs = wanted.refs(life.instance, life.incarnation)
                if not refs:
                    return None
                offer = Offer(refs[0], 0, more=refs[1:])
                num_tokens = offer.num_blocks * tree.block_size
                if num_tokens <= row.num_device_tokens:
                    return None
                return msgspec.structs.replace(offer, num_tokens=num_tokens)
        return None

    def computed(self, request: RequestState, seat: Seat, cached: CachedTokens | None, now: float) -> None:
        """A prompt was computed at `seat`, where `cached` of it was there: the work is done."""
        worker = self._worker_at(seat)
        if worker is None:
            return
        view = worker.view
        worked_ms = worker.backlog.worked_ms(request.request_id, now)
        worker.backlog.remove(request.request_id, now)
        if worked_ms is not None and cached is not None and not cached.pulled:
            batch = Batch(view.num_decoding, view.num_context)
            self._notes.add(
                partial(_learn, worker, request.num_prompt_tokens, cached.total, batch, worked_ms)
            )

    def prefilled(
        self, request: RequestState, seat: Seat, cached: CachedTokens, refs: BlockRefs | None, now: float
    ) -> None:
        """A prefill worker has a prompt in its cache, at `refs` where it says so; else what it had found
        there is learned from.
        """
        worker = self._worker_at(seat)
        if worker is None or not worker.view.caches:
            return
        tree = self._trees[worker.view.role]
        tokens = request.token_bytes(0, request.num_prompt_tokens)
        place = (seat.instance, seat.incarnation, request.cache_salt)
        if refs is None:
            tree.relearn(*place, tokens, cached.device + cached.host, now)
        tree.hold(*place, tokens, now, addresses=None if refs is None else Addresses.of(refs))

    def left(self, request: RequestState, now: float) -> None:
        """A request leaves its workers, in whatever phase. What was not computed is not believed any more."""
        decision = request.decision
        for seat in (request.prefill, request.decode):
            worker = None if seat is None else self._worker_at(seat)
            if seat is None or worker is None or request.request_id not in worker.backlog:
                continue
            worker.backlog.remove(request.request_id, now)
            if decision is not None:
                row, size = decision.prefill, worker.view.block_size
                num_blocks = (row.num_device_tokens + row.num_host_tokens) // size
                tree = self._trees[worker.view.role]
                place = (seat.instance, seat.incarnation, request.cache_salt)
                # Of what `started` believes: whatever else is known there was told.
                tree.remove(*place, request.token_bytes(0, len(request.tokens) - 1), num_blocks)

    def can_read_lost(self, reader: str, dead: str) -> bool:
        """Whether one instance can read what another has left: its memory must be mapped, and a replacement
        does not map what it inherits.
        """
        return reader != dead and (self._reach is None or self._reach.get(reader, {}).get(dead) == "shm")

    def decodes(self, seat: Seat, num_requests: int, num_tokens: int) -> None:
        """So many requests more (or fewer) decode there, attending to so many tokens."""
        worker = self._worker_at(seat)
        if worker is not None:
            worker.view.num_decoding += num_requests
            worker.view.num_context += num_tokens
            worker.stepped_at = None  # the next step may come after a pause

    def stepped(self, instance: str, num_rows: int, now: float) -> None:
        """A step of decodes ended: two of the same size without a prompt beside them tell how long one
        takes.
        """
        worker = self._workers[instance]
        view, before = worker.view, worker.stepped_at
        if before is not None and worker.stepped_rows == num_rows and not view.outstanding_tokens:
            raw_ms = worker.predictor.decode_ms(num_rows, view.num_context)
            worker.correction.observe(Phase.DECODE, False, raw_ms, (now - before) * 1e3)
        worker.stepped_at, worker.stepped_rows = now, num_rows

    # --- what workers tell of their caches ---

    def stored(self, request: RequestState, first_block: int, refs: BlockRefs, now: float) -> None:
        """A worker has blocks of a request, complete or about to be."""
        worker = self._workers[refs.instance]
        if not worker.view.caches:
            return
        end = (first_block + len(refs.blocks)) * worker.view.block_size
        tokens = request.token_bytes(0, min(end, len(request.tokens)))
        self._trees[worker.view.role].hold(
            refs.instance,
            refs.incarnation,
            request.cache_salt,
            tokens,
            now,
            first_block=first_block,
            addresses=Addresses.of(refs),
        )

    def removed(self, refs: BlockRefs, moved_to: BlockRefs | None) -> None:
        """Blocks of a worker are gone, or elsewhere in it. Raises EngineError where that makes no sense."""
        tree = self._trees[self._workers[refs.instance].view.role]
        if moved_to is not None:
            if len(moved_to.blocks) != len(refs.blocks):
                raise EngineError(
                    f"{refs.instance} told of {len(refs.blocks)} blocks that moved to {len(moved_to.blocks)}"
                )
            tree.move_blocks(refs.instance, refs.incarnation, Addresses.of(refs), Addresses.of(moved_to))
        else:
            tree.remove_blocks(refs.instance, refs.incarnation, Addresses.of(refs))

    def held(self, instance: str, incarnation: int, salt: str, tokens: bytes, now: float) -> None:
        """A worker holds a prefix; where, nobody has told."""
        self._believe(instance, incarnation, salt, tokens, now)

    # --- inside ---

    def _worker_at(self, seat: Seat) -> _Worker | None:
        worker = self._workers.get(seat.instance)
        return worker if worker is not None and worker.view.incarnation == seat.incarnation else None

    def _is_reached(self, source: Source) -> bool:
        """Whether every other worker can pull from there: on one machine they are all alike."""
        if self._reach is None:
            return True
        name, others = source.instance, [each for each in self._workers if each != source.instance]
        if source.is_lost:
            return all(self.can_read_lost(other, name) for other in others)
        return all(name in self._reach.get(other, {}) for other in others)

    def _believe(self, instance: str, incarnation: int, salt: str, tokens: bytes, now: float) -> None:
        worker = self._workers.get(instance)
        if worker is not None and worker.view.caches:
            self._trees[worker.view.role].hold(instance, incarnation, salt, tokens, now)

    def _has_room(self, request: RequestState) -> bool:
        """Whether it is worth looking closer: every queued request is asked again with every event."""
        num_tokens = len(request.tokens)
        num_new = request.num_decode_tokens - num_tokens
        views = [worker.view for worker in self._workers.values()]
        prefill, decode = Role.PREFILL, Role.DECODE
        prefills = [view for view in views if view.role is prefill]
        decodes = [view for view in views if view.role is decode]
        if not (prefills and decodes):
            return any(view.has_room(num_tokens, num_new) for view in views)
        if not any(view.has_room(num_tokens, 0) for view in prefills):
            return False
        return num_new <= 1 or any(view.has_room(num_tokens, num_new) for view in decodes)

    def _tree(self, role: Role, block_size: int) -> PromptTree:
        tree = self._trees.get(role)
        if tree is None:
            tree = self._trees[role] = PromptTree(block_size, self._max_blocks)
        return tree


def _learn(worker: _Worker, num_tokens: int, num_cached: int, batch: Batch, worked_ms: float) -> None:
    """A prompt took so long beside that batch: what the prediction would have been corrects those to come."""
    raw_ms = worker.predictor.prefill_ms(num_tokens, num_cached, batch)
    worker.correction.observe(Phase.PREFILL, batch.num_rows > 0, raw_ms, worked_ms)
