"""What workers are told of a request, and how that is taken back: seats, commands, offers.

    start ─► Prefill [+ Reserve] ─► pull_ahead … ─► decode: Decode(offer) ─► release_offer
       └───► Decode                                                            leave, whatever came before

The dispatcher says when; here is what it takes. Each thing given to a worker has one way back, and each of
them may be called when there is nothing to give back.

Invariants
  * Every offer is released exactly once, unless its owner died first.
  * What a worker was promised is given back when the request leaves it (fleet.py).
  * The decode worker's room is taken at the start, so that the first token can be streamed at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from memserve.config import Transfer
from memserve.messages import Cancel, Decode, Offer, Prefill, PullAhead, Release, Reserve, Stored, ToWorker
from memserve.router.events import Action, Send
from memserve.router.fleet import Fleet, Seat
from memserve.router.request_state import Phase, RequestState, StoredBlocks
from memserve.router.scheduling.global_scheduler import GlobalScheduler
from memserve.router.scheduling.policies.decision import Decision
from memserve.router.scheduling.policy import Placement, choose_decode


@dataclass(slots=True)
class Assignments:
    """See the module. What is to be sent is appended to `actions`, which the dispatcher owns."""

    transfer: Transfer
    scheduler: GlobalScheduler
    fleet: Fleet
    actions: list[Action]

    # --- given ---

    def start(self, request: RequestState, decision: Decision, now: float) -> None:
        """Give a queued request to the workers that were chosen."""
        request.decision = decision
        self._seat(request, decision.placement)
        pulled = self.scheduler.offer_of(request, decision.prefill, now)
        self.scheduler.started(request, decision, now)
        if request.prefill is None:
            self._send_decode(request, pulled)
        else:
            self._send_prefill(request, request.prefill, pulled)

    def pull_ahead(self, request: RequestState, stored: Stored) -> None:
        """Let the decode worker pull a chunk while the next is computed, if it was told of the request."""
        if request.is_reserved and request.decode is not None:
            self._send(
                request.decode,
                PullAhead(
                    request_id=stored.request_id,
                    attempt=stored.attempt,
                    first_block=stored.first_block,
                    refs=stored.refs,
                    layers_from=stored.layers_from,
                ),
            )

    def decode(self, request: RequestState) -> None:
        """Send a prefilled request to the worker reserved for it, or to another if that one died
        meanwhile.
        """
        if request.decode is None:
            assert request.prefill is not None
            request.decode = self.fleet.take_seat(
                choose_decode(list(self.fleet), request.prefill.instance),
                num_tokens=request.num_decode_tokens,
                outstanding_tokens=0,
            )
        self._send_decode(request)

    # --- taken back ---

    def cancel(self, request: RequestState) -> None:
        """Tell who works on this attempt to forget it. Harmless where it is already forgotten."""
        seat = request.prefill if request.phase is Phase.PREFILLING else request.decode
        if request.phase is not Phase.QUEUED and seat is not None:
            self._send(seat, Cancel(request.request_id, request.attempt))

    def drop_reservation(self, request: RequestState) -> None:
        """No `Decode` of this attempt will come: the decode worker need not keep what it pulled for it."""
        if request.is_reserved and request.decode is not None:
            self._send(request.decode, Cancel(request.request_id, request.attempt))
        request.is_reserved = False

    def stop_decoding(self, request: RequestState) -> None:
        """It is no longer among its worker's decodes."""
        if request.num_decoding_tokens is not None and request.decode is not None:
            self.scheduler.decodes(request.decode, -1, -request.num_decoding_tokens)
        request.num_decoding_tokens = None

    def release_offer(self, request: RequestState) -> None:
        """The offer is no longer needed: unlock it at its source, and leave that worker."""
        if request.offer is None:
            return
        assert request.prefill is not None
        self._send(request.prefill, Release(request.request_id, request.offer_attempt))
        self.fleet.leave(request.prefill)
        request.offer = request.prefill = None

    def leave(self, request: RequestState, now: float) -> None:
        """The request leaves its workers, in whatever phase."""
        self.scheduler.left(request, now)
        self.stop_decoding(request)
        self.release_offer(request)
        self.fleet.leave(request.prefill)
        self.fleet.leave(request.decode)
        request.prefill = request.decode = None
        request.stored = None

    # --- inside ---

    def _seat(self, request: RequestState, placement: Placement) -> None:
        num_tokens = len(request.tokens)
        if placement.decode is not None:
            request.decode = self.fleet.take_seat(
                placement.decode,
                num_tokens=request.num_decode_tokens,
                outstanding_tokens=num_tokens if placement.prefill is None else 0,
            )
        if placement.prefill is not None:
            request.prefill = self.fleet.take_seat(
                placement.prefill, num_tokens=num_tokens, outstanding_tokens=num_tokens
            )

    def _send_prefill(self, request: RequestState, seat: Seat, pulled: Offer | None) -> None:
        """Start the prefill side. `pulled`: KV that it is to pull from another instance first."""
        request.phase = Phase.PREFILLING
        overlaps = self.transfer != "request" and request.decode is not None
        token_ids = request.token_bytes()
        self._send(
            seat,
            Prefill(
                request_id=request.request_id,
                attempt=request.attempt,
                token_ids=token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
                cache_salt=request.cache_salt,
                tell_blocks=overlaps,
                tell_layers=overlaps and self.transfer == "layer",
                offer=self._salvage_for(request, seat) or pulled,
            ),
        )
        if overlaps:
            assert request.decode is not None
            request.is_reserved = True
            reserve = Reserve(request.request_id, request.attempt, token_ids, request.cache_salt)
            self._send(request.decode, reserve)

    def _send_decode(self, request: RequestState, pulled: Offer | None = None) -> None:
        """Start the decode side: with the offer if there is one, else from nothing, or from what is to be
        `pulled` from another instance.
        """
        seat = request.decode
        assert seat is not None
        request.is_reserved = False
        request.stored = StoredBlocks(seat.instance, seat.incarnation)
        request.phase = Phase.DECODING if request.offer is None else Phase.HANDOFF
        self._send(
            seat,
            Decode(
                request_id=request.request_id,
                attempt=request.attempt,
                token_ids=request.token_bytes(),
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
                cache_salt=request.cache_salt,
                tell_blocks=True,
                offer=request.offer or self._salvage_for(request, seat) or pulled,
            ),
        )
        request.num_decoding_tokens = len(request.tokens)
        self.scheduler.decodes(seat, 1, len(request.tokens))

    def _salvage_for(self, request: RequestState, seat: Seat) -> Offer | None:
        """What a dead worker has left of it and this one can read; only tried once."""
        salvage = request.salvage
        if salvage is None or not self.scheduler.can_read_lost(seat.instance, salvage.refs.instance):
            request.salvage = None
        return request.salvage

    def _send(self, seat: Seat, message: ToWorker) -> None:
        self.actions.append(Send(seat.instance, seat.incarnation, message))
