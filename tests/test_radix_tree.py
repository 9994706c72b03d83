"""The radix tree against a plain list of sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.radix_tree import RadixNode, RadixTree

Payload = list[int]


def make_tree(block_size: int) -> RadixTree[Payload]:
    """A tree whose payload is one number a block."""
    return RadixTree(block_size, lambda namespace: [], lambda payload, n: (payload[:n], payload[n:]))


def key_of(tokens: list[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def insert(tree: RadixTree[Payload], tokens: list[int], numbers: list[int]) -> None:
    """What an index does: match, split where the sequences part, add the rest."""
    key = key_of(tokens)
    key = key[: len(key) // tree.block_bytes * tree.block_bytes]
    found = tree.match(tree.root(""), key)
    rest = key[found.num_blocks * tree.block_bytes :]
    if not rest:
        return
    node = found.node
    if found.num_blocks_in_node * tree.block_bytes < len(node.key):
        node = tree.split(node, found.num_blocks_in_node)
    tree.add(node, rest, numbers[found.num_blocks : len(key) // tree.block_bytes])


def path_payload(node: RadixNode[Payload], num_blocks_in_node: int) -> list[int]:
    parts = [node.payload[:num_blocks_in_node]]
    while node.parent is not None:
        node = node.parent
        parts.append(node.payload)
    return [number for part in reversed(parts) for number in part]


def assert_sound(tree: RadixTree[Payload]) -> None:
    for node in tree:
        assert node.key and len(node.key) % tree.block_bytes == 0
        assert len(node.payload) == len(node.key) // tree.block_bytes
        assert node.parent is not None and node.parent.children[node.key[: tree.block_bytes]] is node


@pytest.mark.parametrize("block_size", [1, 4, 16])
@given(data=st.data())
def test_match_equals_the_longest_common_prefix(block_size: int, data: st.DataObject) -> None:
    tree = make_tree(block_size)
    # few tokens and few blocks, so that prefixes are shared and edges are cut anywhere
    sequences = st.lists(st.integers(0, 2), max_size=6 * block_size)
    known: list[list[int]] = []
    for tokens in data.draw(st.lists(sequences, max_size=12)):
        # the number of a block is a function of everything before it: a wrong split shows
        numbers = [hash(tuple(tokens[: (i + 1) * block_size])) for i in range(len(tokens) // block_size)]
        insert(tree, tokens, numbers)
        known.append(tokens)
        assert_sound(tree)
    query = data.draw(sequences)
    found = tree.match(tree.root(""), key_of(query))
    best = max((_common_blocks(query, tokens, block_size) for tokens in known), default=0)
    assert found.num_blocks == best
    expected = [hash(tuple(query[: (i + 1) * block_size])) for i in range(best)]
    assert path_payload(found.node, found.num_blocks_in_node) == expected


def _common_blocks(a: list[int], b: list[int], block_size: int) -> int:
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same // block_size


def test_a_split_keeps_the_lower_nodes_identity() -> None:
    tree = make_tree(1)
    leaf = tree.add(tree.root(""), key_of([1, 2, 3, 4]), [10, 20, 30, 40])
    upper = tree.split(leaf, 1)
    assert upper.payload == [10] and leaf.payload == [20, 30, 40]
    assert leaf.parent is upper and upper.parent is tree.root("")
    assert tree.match(tree.root(""), key_of([1, 2, 3, 4])).node is leaf


def test_remove_gives_the_parent_and_forgets() -> None:
    tree = make_tree(2)
    upper = tree.add(tree.root(""), key_of([1, 2]), [0])
    leaf = tree.add(upper, key_of([3, 4]), [1])
    assert tree.remove(leaf) is upper
    assert tree.match(tree.root(""), key_of([1, 2, 3, 4])).num_blocks == 1
    with pytest.raises(AssertionError):
        tree.remove(tree.root(""))


def test_a_partial_block_never_matches() -> None:
    tree = make_tree(4)
    tree.add(tree.root(""), key_of([1, 2, 3, 4, 5, 6, 7, 8]), [0, 1])
    assert tree.match(tree.root(""), key_of([1, 2, 3])).num_blocks == 0
    assert tree.match(tree.root(""), key_of([1, 2, 3, 4, 5])).num_blocks == 1
    assert tree.match(tree.root(""), key_of([1, 2, 3, 4, 5, 6, 7, 9])).num_blocks == 1


def test_namespaces_share_nothing_and_can_be_forgotten() -> None:
    tree = make_tree(1)
    leaf = tree.add(tree.root("a"), key_of([1, 2]), [0, 1])
    assert tree.match(tree.root("b"), key_of([1, 2])).num_blocks == 0
    tree.drop_root("b")
    with pytest.raises(AssertionError):
        tree.drop_root("a")
    tree.remove(leaf)
    tree.drop_root("a")
    assert list(tree) == []


def test_children_of_one_leaf_are_not_those_of_another() -> None:
    tree = make_tree(1)
    first, second = (tree.add(tree.root(""), key_of([token]), [token]) for token in (1, 2))
    below = tree.add(first, key_of([3]), [3])
    assert list(first.children.values()) == [below] and not second.children and not below.children
    tree.remove(below)
    assert not first.children
    tree.add(second, key_of([3]), [3])
    assert not first.children and not below.children
