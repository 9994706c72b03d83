"""How far two texts agree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.router.text.token_text import agreement

texts = st.text(alphabet="ab", max_size=40).map(str.encode)


@given(texts, texts, texts)
def test_agreement_is_the_length_of_the_common_prefix(common: bytes, a: bytes, b: bytes) -> None:
    one, other = common + a, common + b
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert agreement(one, other) == expected
