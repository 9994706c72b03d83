"""Tile shapes of the kernels, kept per GPU in `tuned/<name>.json` and given to every launch.

A file holds what was chosen for one GPU, `default.json` for any other and for what a file leaves out. Keys of
a kernel's entries are `<bytes of an element>x<head_dim, up to a power of two>`. `benchmarks/tune_kernels.py`
tries candidates on the GPU at hand and writes such a file. A `Tuning` is plain data: it is handed down, never
looked up by a kernel.
"""

from __future__ import annotations

from importlib import resources
from typing import TypeVar

import msgspec
import torch

DEFAULT = "default"
INTERPRETER = "interpreter"
Config = TypeVar("Config")


class PrefillConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`block_m` rows (queries x the query heads of a key head) against `block_n` keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class DecodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`block_n` keys at a time; the keys are split until there are `programs_per_sm` programs for each SM."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


class SkinnyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`block_n` rows of the matrix, `block_k` elements of each at a time, for x of up to `max_rows` rows.

    Of a gated product half of the rows are the gate's. `max_rows` 0: products are left to the library.
    """

    max_rows: int = 0
    block_n: int = 16
    block_k: int = 256
    num_warps: int = 4
    num_stages: int = 4


class KernelConfigs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of one file."""

    prefill: dict[str, PrefillConfig] = {}
    decode: dict[str, DecodeConfig] = {}
    skinny: SkinnyConfig | None = None


class Tuning(msgspec.Struct, frozen=True):
    """What kernels are launched with on one device. `num_sms`: its multiprocessors."""

    num_sms: int
    configs: KernelConfigs

    @classmethod
    def of(cls, device: torch.device) -> Tuning:
        """For `device`: a GPU by its name; the interpreter, whose 4 processors are made up, elsewhere."""
        if device.type != "cuda":
            return cls(4, read_configs(INTERPRETER))
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, read_configs(file_name(properties.name)))

    def prefill(self, element_bytes: int, block_d: int) -> PrefillConfig:
        """For elements of that size and heads padded to `block_d`."""
        return _nearest(self.configs.prefill, element_bytes, block_d)

    def decode(self, element_bytes: int, block_d: int) -> DecodeConfig:
        """Likewise."""
        return _nearest(self.configs.decode, element_bytes, block_d)

    def skinny(self, num_rows: int, element_bytes: int) -> SkinnyConfig | None:
        """For x of so many rows; None where the library's products are to be used.

        Always so in float32, in which a row's result shall not depend on the rows beside it.
        """
        config = self.configs.skinny
        return config if config and num_rows <= config.max_rows and element_bytes < 4 else None


def file_name(gpu: str) -> str:
    """The name of a GPU's file, without its ending."""
    return "".join(char if char.isalnum() else "_" for char in gpu)


def read_configs(name: str) -> KernelConfigs:
    """The defaults, overlaid by the file of that name where there is one."""
    folder = resources.files(__package__) / "tuned"
    merged = msgspec.json.decode((folder / f"{DEFAULT}.json").read_bytes(), type=KernelConfigs)
    own = folder / f"{name}.json"
    if name == DEFAULT or not own.is_file():
        return merged
    found = msgspec.json.decode(own.read_bytes(), type=KernelConfigs)
    if name == INTERPRETER:
        return found
    return KernelConfigs(
        prefill={**merged.prefill, **found.prefill},
        decode={**merged.decode, **found.decode},
        skinny=found.skinny or merged.skinny,
    )


def _nearest(configs: dict[str, Config], element_bytes: int, block_d: int) -> Config:
    """The entry of that size, else the next wider one's: what fits a wider head fits."""
    sizes = [block_d << step for step in range(5)]
    fitting = [key for size in sizes if (key := f"{element_bytes}x{size}") in configs]
    assert fitting, f"no tile shapes for elements of {element_bytes} bytes and heads of {block_d}"
    return configs[fitting[0]]
