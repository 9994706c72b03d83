"""What a step drew becomes messages to the router: one `StepOutputs` for all decodes, one `Prefilled` for
each prefill that is done.

Its requests move on by it: their tokens are settled, their blocks published, and those that are done finish
or become offers (register.py). A message can be too long for a frame, by logprobs of a long prompt: then its
request has failed, and the others are told one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memserve.messages import NO_CACHED_TOKENS, FinishReason, Load, Output, Prefilled, StepOutputs
from memserve.workers.channel import Channel, MessageTooLong
from memserve.workers.publisher import Publisher
from memserve.workers.register import Register
from memserve.workers.request import Request, RequestKind, RequestState
from memserve.workers.steps import Chunk, Drawn


class Telling:
    """See the module.

    Args:
        load: what the worker is doing, as told with every message.
        clock: seconds, that of `Request.began_at`.
    """

    def __init__(
        self,
        channel: Channel,
        register: Register,
        publisher: Publisher,
        max_model_len: int,
        load: Callable[[], Load],
        clock: Callable[[], float],
    ) -> None:
        self._channel = channel
        self._register = register
        self._publisher = publisher
        self._max_model_len = max_model_len
        self._load = load
        self._clock = clock

    def tell(self, chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> None:
        """Take the drawn tokens, one result a chunk, and tell the router."""
        outputs: list[Output] = []
        prefilled: list[tuple[Request, Drawn, FinishReason | None]] = []
        for (request, _), result in zip(chunks, drawn, strict=True):
            if request.state is not RequestState.RUNNING:
                continue  # it has ended meanwhile
            if result.prompt_logprobs:
                request.add_prompt_logprobs(result.prompt_logprobs)
            if result.error is not None:
                self._register.fail_and_forget(request, result.error)
                continue
            self._publisher.publish(request)
            token_id = result.token_id
            if token_id is None or request.kind is RequestKind.DECODE:
                self._publisher.tell(request)  # a prefill that is done tells of all its blocks in its offer
            if token_id is None:
                continue
            request.settle(token_id)
            reason = request.finish_reason(self._max_model_len)
            if request.kind is RequestKind.PREFILL:
                prefilled.append((request, result, reason))
                continue
            if reason is not None:
                self._register.finish(request)
            logprobs = None if result.logprobs is None else (result.logprobs,)
            prompt_logprobs = request.take_prompt_logprobs()
            outputs.append(
                Output(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    token_ids=(token_id,),
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    finish_reason=reason,
                    cached=(cached := request.take_cached()),
                    computing_ms=None if cached is None else self._computing_ms(request),
                )
            )
        if outputs:
            self._send_outputs(outputs)
        for request, result, reason in prefilled:
            self._tell_prefilled(request, result, reason)

    def _send_outputs(self, outputs: Sequence[Output]) -> None:
        """One message, or as many as it takes: prompt logprobs can be long. Too long for one is a failure."""
        try:
            self._channel.send(StepOutputs(tuple(outputs), self._load()))
        except MessageTooLong as error:
            if len(outputs) > 1:
                for output in outputs:
                    self._send_outputs((output,))
                return
            (output,) = outputs
            request = self._register.get(output.request_id)
            if request is not None:
                self._register.finish(request)
            self._register.tell_failed(output.request_id, output.attempt, f"its answer is too long: {error}")

    def _tell_prefilled(self, request: Request, drawn: Drawn, reason: FinishReason | None) -> None:
        assert drawn.token_id is not None
        offer = None
        if reason is None:
            offer = self._register.offer(request, self._clock())
        else:
            self._register.finish(request)
        message = Prefilled(
            request_id=request.request_id,
            attempt=request.attempt,
            token_id=drawn.token_id,
            logprobs=drawn.logprobs,
            prompt_logprobs=request.take_prompt_logprobs(),
            cached=request.take_cached() or NO_CACHED_TOKENS,
            finish_reason=reason,
            offer=offer,
            load=self._load(),
            computing_ms=self._computing_ms(request),
        )
        try:
            self._channel.send(message)
        except MessageTooLong as error:
            self._register.release(request.request_id, request.attempt)
            failure = f"its answer is too long: {error}"
            self._register.tell_failed(request.request_id, request.attempt, failure)

    def _computing_ms(self, request: Request) -> float:
        assert request.began_at is not None
        return (self._clock() - request.began_at) * 1e3
