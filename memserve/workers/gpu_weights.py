"""The weights of workers that share a GPU: loaded by one, and read by the others where they are.

    the first   allocate ─► fill ─► export (descriptor) ─► Loaded ─► …
    the others                           granted ─► open, read-only ─► the same Weights, no copy

The supervisor keeps the descriptor, so the weights outlive the worker that loaded them. Where memory cannot
be exported as a descriptor, or a grant cannot be opened, a worker loads its own, and says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from memserve.config import WorkerConfig
from memserve.cuda.driver import CudaDriver, CudaError, LibCuda
from memserve.cuda.memory import DeviceExport, DeviceMemory, allocate, open_exported
from memserve.messages import Export, WeightsExport
from memserve.models.weights import (
    Weights,
    device_weights_bytes,
    fill_device_weights,
    load_weights_to_device,
    view_device_weights,
)

logger = logging.getLogger(__name__)


class GpuLoader:
    """Brings the weights to `device`.

    Args:
        config: whose weights; whether others read them too.
        device: a GPU; tests have none.
        send: hands an export and its descriptor to the supervisor.
        progress: told fractions from 0 to 1.
        driver: CUDA's; None = that of this machine, if it is needed.
    """

    def __init__(
        self,
        config: WorkerConfig,
        device: torch.device,
        send: Callable[[Export, int | None], None],
        progress: Callable[[float], None],
        driver: CudaDriver | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._send = send
        self._progress = progress
        self._driver = driver
        self._num_bytes = device_weights_bytes(config.model, config.dtype)
        self._memory: DeviceMemory | None = None  # as long as the process

    def load(self) -> Weights:
        """Read them, from files or made up, and export them if they are to be shared. Raises ModelError,
        MemoryError_.
        """
        config = self._config
        if config.shares_weights:
            exported = self._allocate()
            if exported is not None:
                memory, export, fd = exported
                try:
                    return self._fill_and_export(memory, export, fd)
                finally:
                    os.close(fd)
        return load_weights_to_device(
            config.model,
            Path(config.model_path),
            config.dtype,
            self._device,
            config.load_format,
            config.seed,
            self._progress,
        )

    def open(self, export: DeviceExport, fd: int) -> Weights:
        """Those that another worker has loaded; the descriptor is ours. If they cannot be opened, our own."""
        try:
            driver, ordinal = self._driver_and_ordinal()
            if driver.uuid(ordinal) != export.gpu:
                os.close(fd)
                raise CudaError(f"they are on {export.gpu}, not on {driver.uuid(ordinal)}")
            memory = open_exported(driver, ordinal, export, fd)
        except CudaError as error:
            logger.warning("the weights on this GPU cannot be shared, loading our own: %s", str(error))
            return self.load()
        if memory.num_bytes < self._num_bytes:
            memory.close()
            logger.warning("the weights on this GPU are of another model, loading our own")
            return self.load()
        self._progress(1.0)
        return self._view(memory)

    def _allocate(self) -> tuple[DeviceMemory, DeviceExport, int] | None:
        """Memory that others can open, its export and descriptor; None if there is none of the kind."""
        try:
            driver, ordinal = self._driver_and_ordinal()
            memory = allocate(driver, ordinal, self._num_bytes)
            try:
                export, fd = memory.export()
            except CudaError:
                memory.close()
                raise
        except CudaError as error:
            logger.warning("the weights on this GPU cannot be shared: %s", str(error))
            return None
        if fd is None:
            memory.close()
            logger.warning("the weights on this GPU are not shared: they would end with this worker")
            return None
        return memory, export, fd

    def _fill_and_export(self, memory: DeviceMemory, export: DeviceExport, fd: int) -> Weights:
        config = self._config
        buffer = memory.tensor(self._device)[: self._num_bytes]
        folder = Path(config.model_path)
        fill_device_weights(
            config.model, folder, config.dtype, config.load_format, config.seed, buffer, self._progress
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the others' reads are not ordered after ours
        self._send(WeightsExport(self._num_bytes, export), fd)
        return self._view(memory)

    def _view(self, memory: DeviceMemory) -> Weights:
        self._memory = memory
        buffer = memory.tensor(self._device)[: self._num_bytes]
        return view_device_weights(self._config.model, self._config.dtype, buffer)

    def _driver_and_ordinal(self) -> tuple[CudaDriver, int]:
        if self._driver is None:
            self._driver = LibCuda()
        return self._driver, self._device.index or 0
