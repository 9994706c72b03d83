"""A worker without a model: speaks the protocol, does as it is told. Run by test_supervisor.py.

`--mode` says how it starts; once ready, the request id of a `Cancel` is an order: "exit" ends the process,
"garbage" sends nonsense, "report" answers `Failed` with what it was granted, as JSON. In mode "gpu" a memfd
stands for the memory of a GPU, in mode "no-export" for nothing that anybody sends; in mode "no-weights" the
loader keeps its weights for itself.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from memserve.cuda.memory import DeviceExport  # noqa: E402
from memserve.messages import (  # noqa: E402
    FRAME_HEADER,
    ArenaExport,
    ArenaGrant,
    Cancel,
    DeviceGrant,
    Failed,
    Fatal,
    Heartbeat,
    Init,
    Load,
    Loaded,
    Loading,
    PeerGrant,
    Ready,
    RevokeGrant,
    Shutdown,
    ToRouter,
    ToWorker,
    WeightsExport,
    WeightsGrant,
    decode_grant,
    decode_to_worker,
    encode_export,
    encode_frame,
)


class FakeWorker:
    def __init__(self, control_fd: int, grants_fd: int, mode: str) -> None:
        self.control = socket.socket(fileno=control_fd)
        self.grants = socket.socket(fileno=grants_fd)
        self.mode = mode
        self.incarnation = 0
        self.lock = threading.Lock()

    def send(self, message: ToRouter) -> None:
        with self.lock:
            self.control.sendall(encode_frame(message, self.incarnation))

    def receive(self) -> ToWorker | None:
        header = self.control.recv(FRAME_HEADER.size, socket.MSG_WAITALL)
        if not header:
            return None
        num_bytes, incarnation = FRAME_HEADER.unpack(header)
        message = decode_to_worker(self.control.recv(num_bytes, socket.MSG_WAITALL))
        self.incarnation = incarnation
        return message

    def run(self) -> int:
        if self.mode == "exit":
            return 3
        init = self.receive()
        if init is None:
            return 0
        assert isinstance(init, Init) and init.incarnation == self.incarnation
        config = init.config
        if self.mode == "fatal" and config.instance == "decode-0":
            self.send(Fatal("ModelError", "model.safetensors is truncated"))
            return 1
        if self.mode == "never-ready-again" and init.incarnation > 0:
            return 3
        threading.Thread(target=self.beat, daemon=True).start()
        if config.device != "cpu":
            if config.shares_weights:
                self.share_weights(init)
        elif init.weights_manifest is None:
            for fraction in (0.5, 1.0):
                self.send(Loading("weights", fraction))
            if self.mode == "stuck-loading":
                signal.pause()
            self.send(Loaded(b"manifest"))
        else:
            assert init.weights_manifest == b"manifest"
        num_blocks, block_size = config.num_blocks, config.block_size
        num_blocks = num_blocks or 16
        other = self.mode == "other-model" and config.instance == "decode-0"
        other = other or (self.mode == "other-model-again" and init.incarnation > 0)
        fingerprint = "other" if other else "fingerprint"
        if self.mode == "boasts":
            num_blocks = 2**29
        if self.mode in ("gpu", "no-weights", "no-export"):
            self.export(config.instance)
        self.send(Ready(num_blocks, block_size, config.max_model_len, fingerprint, "cpu", "float32", 0.0))
        return self.serve()

    def export(self, instance: str) -> None:
        fd = os.memfd_create(instance, os.MFD_CLOEXEC)
        os.ftruncate(fd, 4096 * (self.incarnation + 1))
        export = ArenaExport(16, 256, DeviceExport("GPU-0", 4096))
        fds = [] if self.mode == "no-export" else [fd]
        socket.send_fds(self.grants, [encode_export(export)], fds)
        os.close(fd)

    def share_weights(self, init: Init) -> None:
        if init.weights_manifest is not None:
            assert init.weights_manifest == b""
            return
        fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        os.ftruncate(fd, 512)
        export = WeightsExport(500, DeviceExport("GPU-0", 512))
        if self.mode != "no-weights":
            socket.send_fds(self.grants, [encode_export(export)], [fd])
        os.close(fd)
        self.send(Loaded(b""))

    def serve(self) -> int:
        while (message := self.receive()) is not None:
            if isinstance(message, Shutdown):
                if self.mode == "stubborn":
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    time.sleep(600)
                return 0
            if isinstance(message, Cancel):
                self.obey(message)
        return 0

    def obey(self, order: Cancel) -> None:
        if order.request_id == "exit":
            self.send(Failed("exit", order.attempt, "last word"))
            os._exit(order.attempt)
        if order.request_id == "garbage":
            with self.lock:
                self.control.sendall(FRAME_HEADER.pack(5, self.incarnation) + b"\xc1\xc1\xc1\xc1\xc1")
        if order.request_id == "report":
            self.send(Failed("report", order.attempt, json.dumps(self.report())))

    def report(self) -> dict[str, object]:
        """What was granted since the last report, and where this process may run."""
        self.grants.setblocking(False)
        arenas, weights = [], []
        while True:
            try:
                body, fds, _, _ = socket.recv_fds(self.grants, 4096, 4)
            except BlockingIOError:
                break
            grant = decode_grant(body)
            writable = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR for fd in fds]
            sizes = [os.fstat(fd).st_size for fd in fds]
            if isinstance(grant, ArenaGrant):
                assert sizes == [grant.num_blocks * grant.block_bytes, (grant.num_blocks + 1) * 8]
                arenas.append([grant.instance, grant.incarnation, *writable])
            elif isinstance(grant, PeerGrant):
                assert not fds
                arenas.append([grant.instance, grant.incarnation])
            elif isinstance(grant, DeviceGrant):
                assert sizes[0] == (grant.max_blocks + 1) * 8
                assert grant.memory is None or (grant.num_blocks, grant.block_bytes) == (16, 256)
                arenas.append([grant.instance, grant.incarnation, writable[0], sizes[1:]])
            elif isinstance(grant, RevokeGrant):
                assert not fds
                arenas.append([grant.instance, "revoked", grant.tier])
            elif isinstance(grant, WeightsGrant):
                assert sizes == [grant.num_bytes if grant.memory is None else grant.memory.num_bytes]
                weights.extend(writable)
            for fd in fds:
                os.close(fd)
        return {"arenas": arenas, "weights": weights, "cpus": sorted(os.sched_getaffinity(0))}

    def beat(self) -> None:
        while True:
            self.send(Heartbeat(0, 0.0, Load()))
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--grants-fd", type=int, required=True)
    parser.add_argument("--title", required=True)
    parser.add_argument("--mode", default="ok")
    args = parser.parse_args()
    status = FakeWorker(args.control_fd, args.grants_fd, args.mode).run()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
