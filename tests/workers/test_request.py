"""What a request remembers: tokens, blocks, and what is reported with the first token."""

from __future__ import annotations

from memserve.messages import FinishReason, TokenLogprobs
from memserve.workers.request import Request, RequestKind, RequestState


def test_a_new_request(tools):
    request = Request.of(tools.decode("a", [5, 6, 7, 8], num_prompt=3, stop_token_ids=(9,)), arrival=4)
    assert (request.kind, request.state, request.arrival) == (RequestKind.DECODE, RequestState.WAITING, 4)
    assert request.prompt_ids.tolist() == [5, 6, 7] and request.output_ids == [8]
    assert Request.of(tools.prefill("a", [5]), 0).kind is RequestKind.PREFILL


def test_tokens_grow(tools):
    request = Request.of(tools.decode("a", [1, 2, 3]), 0)
    for token_id in range(500):
        request.append(token_id)
    assert request.tokens(0, request.num_tokens).tolist() == [1, 2, 3, *range(500)]
    assert request.output_ids == list(range(500)) and request.prompt_ids.tolist() == [1, 2, 3]


def test_finish_counts_from_the_prompt(tools):
    message = tools.decode("a", [1, 2, 3, 4], num_prompt=2, max_tokens=4, stop_token_ids=(9,), min_tokens=3)
    request = Request.of(message, 0)
    request.append(9)  # the third output: not before min_tokens
    assert request.finish_reason(100) is None
    assert request.finish_reason(5) is FinishReason.LENGTH
    request.append(9)
    assert request.finish_reason(100) is FinishReason.STOP
    request.append(8)
    assert request.finish_reason(100) is FinishReason.LENGTH


def test_prompt_logprobs_are_reported_once(tools):
    request = Request.of(tools.decode("a", [1, 2, 3], prompt_logprobs=0), 0)
    request.add_prompt_logprobs([TokenLogprobs(-1.0, 1)])
    request.restart()
    request.add_prompt_logprobs([TokenLogprobs(-1.0, 1), TokenLogprobs(-2.0, 1)])
    reported = request.take_prompt_logprobs()
    assert reported == (None, TokenLogprobs(-1.0, 1), TokenLogprobs(-2.0, 1))
    assert request.take_prompt_logprobs() is None
    # Not where the first token was drawn before, which reported them.
    replay = Request.of(tools.decode("a", [1, 2, 3], num_prompt=2, prompt_logprobs=0), 0)
    assert replay.take_prompt_logprobs() is None


def test_a_token_that_is_being_drawn_counts_and_is_settled_later(tools):
    request = Request.of(tools.decode("a", [1, 2, 3], max_tokens=2), 0)
    request.expect(100)
    assert request.is_drawing and not request.is_at_end
    assert request.num_tokens == 4 and request.output_ids == []
    request.settle(7)
    assert not request.is_drawing and request.output_ids == [7]
    assert request.tokens(0, 4).tolist() == [1, 2, 3, 7]
    # the end by length is known ahead, and what fails is undone
    request.expect(100)
    assert request.is_at_end and request.num_tokens == 5
    request.unexpect()
    request.unexpect()
    assert request.num_tokens == 4 and request.output_ids == [7]
    # by the limit of the model; and a prefill ends with its first token
    for message, limit in ((tools.decode("a", [1, 2, 3]), 4), (tools.prefill("a", [1, 2, 3]), 100)):
        request = Request.of(message, 0)
        request.expect(limit)
        assert request.is_at_end


def test_who_looks_back_at_what_was_drawn(tools):
    """With min_tokens until the mask of the next token no longer depends on how many are known."""
    assert not Request.of(tools.decode("a", [1, 2], temperature=0.5, top_p=0.5, logprobs=2), 0).looks_back
    for asked in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        assert Request.of(tools.decode("a", [1, 2], **asked), 0).looks_back
    request = Request.of(tools.decode("a", [1, 2], min_tokens=2), 0)
    found = []
    for token_id in range(4):
        found.append(request.looks_back)
        request.append(token_id)
    assert found == [True, True, True, False]
