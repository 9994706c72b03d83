"""The base of every struct that is a message of its own."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of the wire structs: positional msgpack, tagged with the class name.

    `gc=False` throughout: they are made by the thousand a second, and can hold no cycles.
    """
