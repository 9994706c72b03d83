"""All that memserve claims of a GPU, checked on the one at hand in one go: `make gpu-check`, under 8 minutes.

    1. the tests marked `gpu`
    2. each Triton kernel against its plain twin, float32 and bfloat16, on fresh random inputs
    3. a server with a prefill and a decode worker on this GPU against a colocated one: the same tokens in
       float32; in bfloat16 log-probabilities within BF16_LOGPROB
    4. copies against what this GPU reaches in the same run: a pull of 8k tokens of Llama-3-8B's KV out of
       another process's arena, in one run and scattered, against a plain copy on the device; swaps against
       plain copies from and to pinned memory
    5. Llama-3-8B's shapes, bfloat16, dummy weights, against the copy bandwidth and the matrix rate measured
       beside them: decode steps of 1 and 64 requests, a prefill of 8k tokens, the attention of 64 decodes

A short table comes last; exit status 1 if any line of it fails, 2 if there is no GPU. `--only 34` makes parts
of it; `--seed` draws other inputs. More of 5: benchmarks/gpu_engine.py, beside transformers, and
benchmarks/kernels.py, of every kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
PULL_SHARE = 0.70
SWAP_SHARE = 0.80
KERNEL_SHARE = 0.80
BF16_LOGPROB = 0.15
NUM_TOKENS = 8192
MAX_TOKENS = 32
_START_S = 120.0
_MEASURED_S = 200.0
_TESTS_S = 240.0
# What of tests/gpu/test_kernels.py is compiled in a process of its own: a name, and what `-k` takes.
KERNEL_TESTS = (
    ("decode attention", "test_decode_attention and None"),
    ("decode attention, windows", "test_decode_attention and 1000"),
    ("prefill attention", "test_prefill_attention and None"),
    ("prefill attention, windows", "test_prefill_attention and 500"),
    ("few rows", "test_products_of_few_rows"),
    ("the others", "not attention and not few_rows"),
)
_NUM_REPEATS = 9
PROMPTS = (
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Once upon a time there was a little girl who lived in a wood. " * 9,
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 " * 6,
)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    found: str
    wanted: str
    passed: bool


@dataclass(frozen=True)
class Answer:
    """A completion, and how many of the bytes of KV that its server moved so far."""

    text: str
    logprobs: tuple[float, ...]
    pulled: float


def main() -> int:
    """Make the parts, print the table."""
    parser = argparse.ArgumentParser(description="Check memserve on the GPU at hand.")
    parser.add_argument("--only", default="12345", metavar="PARTS", help="of 12345 [default: all]")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbits(31), help="of random inputs [default: drawn]"
    )
    options = parser.parse_args()
    if not set(options.only) <= set("12345"):
        parser.error(f"--only {options.only}: the parts are 1 to 5")
    try:
        import torch

        has_gpu = torch.cuda.is_available()
    except ImportError:
        has_gpu = False
    if not has_gpu:
        print("gpu-check: torch finds no GPU on this machine, so nothing can be checked", file=sys.stderr)
        return 2
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "1": run_tests,
        "2": lambda: check_twins(options.seed),
        "3": check_servers,
        "4": measure_copies,
        "5": measure_engine,
    }
    lines: list[Line] = []
    began_at = time.monotonic()
    for part in options.only:
        print(f"part {part}, after {time.monotonic() - began_at:.0f} s", flush=True)
        try:
            for line in parts[part]():
                lines.append(line)
                _print(line)  # at once: whoever ends this early has what there is
        except Exception as error:  # the other parts are worth having all the same
            print(error, flush=True)
            lines.append(Line(f"part {part}", f"{type(error).__name__}: {error}"[:90], "to run", False))
    print(f"\n{torch.cuda.get_device_name(0)}, seed {options.seed}, {time.monotonic() - began_at:.0f} s")
    for line in lines:
        _print(line)
    return 0 if all(line.passed for line in lines) else 1


def _print(line: Line) -> None:
    verdict = "ok  " if line.passed else "FAIL"
    print(f"{verdict}  {line.what:<46} {line.found:<34} {line.wanted}", flush=True)


# --- 1 and 2 ---


def run_tests() -> Iterator[Line]:
    """The tests of tests/gpu, but for the servers: part 3 starts them too. Those of kernels wait for the
    compiler, so several run at a time; the others look at how much of the GPU is free.
    """
    began = [(name, _start_tests("tests/gpu/test_kernels.py", chosen)) for name, chosen in KERNEL_TESTS]
    for name, ran in began:
        yield _tests_line(f"tests of kernels: {name}", ran)
    others = [f"tests/gpu/test_{name}.py" for name in ("cuda", "cuda_ipc", "runner")]
    yield _tests_line("other tests marked gpu", _start_tests(*others, "not test_a_server_says"))


def _start_tests(*files_and_choice: str) -> subprocess.Popen[str]:
    """pytest over files, of which `-k` chooses by the last argument.

    What the machine's plugins are, or warn of, is not asked: no plugin is needed here that pytest lacks.
    """
    *files, choice = files_and_choice
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "--import-mode=importlib", "-W", "default"]
    command += ["-q", "-m", "gpu", "-k", choice, *files]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _tests_line(what: str, tests: subprocess.Popen[str]) -> Line:
    try:
        told, _ = tests.communicate(timeout=_TESTS_S)
    except subprocess.TimeoutExpired:
        tests.kill()
        told, _ = tests.communicate()
        told += f"\n= ended after {_TESTS_S:g} s, in the middle ="
    if tests.returncode != 0:
        print(told[-4000:])
    last = next((line for line in reversed(told.splitlines()) if " in " in line), "no summary")
    return Line(what, last.strip("= ")[:34], "all pass", tests.returncode == 0)


def check_twins(seed: int) -> Iterator[Line]:
    """Kernels by kernels."""
    from memserve.doctor.kernels import check_kernels
    from memserve.doctor.report import Verdict

    for finding in check_kernels("cuda:0", seed):
        yield Line(
            f"kernel {finding.name}", finding.found[:34], "its twin's", finding.verdict is Verdict.GOOD
        )


# --- 3 ---


def check_servers() -> Iterator[Line]:
    """Disaggregated against colocated, in both types."""
    colocated = answers(["--colocated", "1", "--dtype", "float32"])
    for transfer in ("request", "layer"):
        found = answers(["--prefill", "1", "--decode", "1", "--dtype", "float32", "--transfer", transfer])
        same = sum(a.text == b.text for a, b in zip(found, colocated, strict=True))
        moved = found[-1].pulled > 0
        yield Line(
            f"1P+1D = colocated, float32, by {transfer}",
            f"{same} of {len(found)} the same, {'KV pulled' if moved else 'NO KV PULLED'}",
            "all",
            same == len(found) and moved,
        )
    colocated = answers(["--colocated", "1", "--dtype", "bfloat16"])
    found = answers(["--prefill", "1", "--decode", "1", "--dtype", "bfloat16"])
    worst = 0.0
    for one, other in zip(found, colocated, strict=True):
        # once a token differs the sequences do, so only what comes up to there can be compared
        same = os.path.commonprefix([one.text, other.text])
        num_same = max(1, len(one.logprobs) * len(same) // max(1, len(one.text)))
        pairs = zip(one.logprobs[:num_same], other.logprobs[:num_same], strict=False)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    yield Line(
        "1P+1D = colocated, bfloat16",
        f"log-probabilities differ by {worst:.3f}",
        f"<= {BF16_LOGPROB}",
        worst <= BF16_LOGPROB,
    )


def answers(options: list[str]) -> list[Answer]:
    """What a server with these options says to PROMPTS, greedily. It runs only as long as that takes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # By prompt tree a decode worker would prefill such short prompts itself: on a GPU that is one step more.
    fixed = ["--device", "cuda", "--device-memory", "1GiB", "--calibration", "off", "--port", str(port)]
    fixed += ["--policy", "round-robin"]
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "memserve", "serve", *fixed, *options]
        server = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_ready(url, server)
            return [_ask(url, prompt) for prompt in PROMPTS]
        except Exception as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read()[-3000:].decode(errors='replace')}") from error
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def _ask(url: str, prompt: str) -> Answer:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=90) as answer:
        (choice,) = json.load(answer)["choices"]
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        samples = re.findall(r"^memserve_pulled_bytes_total\S* ([0-9.e+]+)$", answer.read().decode(), re.M)
    pulled = sum(map(float, samples))
    return Answer(choice["text"], tuple(choice["logprobs"]["token_logprobs"]), pulled)


# --- 4 ---


def measure_copies() -> Iterator[Line]:
    """Pulls and swaps of Llama-3-8B's blocks."""
    import torch

    from memserve import memfd
    from memserve.cuda.driver import LibCuda
    from memserve.doctor.gpus import lent_memory
    from memserve.messages import BlockRefs, DeviceGrant, Tier, generation_table_bytes
    from memserve.model_config import KVGeometry
    from memserve.pool.arena import Arena
    from memserve.pool.lanes import Lanes
    from memserve.pool.mempool import MemPool
    from memserve.pool.pinned import CudaPins
    from memserve.pool.retention import HostArena, Retention
    from memserve.pool.transports.by_peer import PeerTransfer
    from memserve.pool.transports.cuda_ipc import CudaTransfer
    from memserve.pool.transports.device_sources import Gpu
    from memserve.workers.gpu_arena import make_arena, scatter_of

    geometry = KVGeometry(num_layers=32, num_kv_heads=8, block_size=16, head_dim=128, dtype="bfloat16")
    wanted = NUM_TOKENS // geometry.block_size
    num_blocks, size = 2 * wanted, wanted * geometry.block_bytes
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    on_device, to_host, to_device = _copy_rates(size)
    yield Line("device copy, read + written", f"{2 * on_device / 1e9:.0f} GB/s", "(measured)", True)
    yield Line(
        "pinned copy, out and in", f"{to_host / 1e9:.1f} and {to_device / 1e9:.1f} GB/s", "(measured)", True
    )

    gpu = Gpu(LibCuda(), 0, device, Lanes.on(device, scatter_of(device)))
    table_fd = memfd.create_memfd("generations", generation_table_bytes(num_blocks))
    arena = make_arena(gpu, geometry, num_blocks, table_fd, num_blocks, 0)
    host, _ = Arena.create("host", geometry, wanted)
    cuda = CudaTransfer(arena.as_bytes(), gpu, lambda: None, num_layers=geometry.num_layers)
    pool = MemPool(
        arena,
        "receiver",
        0,
        lambda: None,
        retention=Retention(host=HostArena(host, wanted, pins=CudaPins(gpu.driver, 0))),
        transfer=PeerTransfer(lambda: None, None, cuda=cuda),
        lanes=gpu.lanes,
    )
    pool.populate()
    with lent_memory(0, num_blocks * geometry.block_bytes) as (export, fd):
        # The other process lends memory alone; a table in which nothing changes stands for its generations.
        table = memfd.create_memfd("lent", generation_table_bytes(num_blocks))
        grant = DeviceGrant("source", 0, num_blocks, num_blocks, geometry.block_bytes, export)
        pool.peers.add_device(grant, table, fd)
        into = pool.alloc_mem(wanted)
        assert into is not None
        rng = np.random.default_rng(0)
        for name, ids in (
            ("one run", np.arange(wanted)),
            ("scattered", rng.permutation(num_blocks)[:wanted]),
        ):
            refs = BlockRefs("source", 0, Tier.DEVICE, tuple(ids.tolist()), (0,) * wanted)

            def pull(refs: BlockRefs = refs) -> float:
                arrived = pool.fetch(refs, into)
                while (result := arrived.poll()) is None:
                    time.sleep(0)
                assert result.failure is None, result.failure
                return result.elapsed_ms / 1e3

            rate = size / _median(pull)
            yield _share(f"pull of 8k tokens, {name}", rate, on_device, PULL_SHARE)
        pool.peers.remove("source")

    def swap(put: Callable[[], None]) -> Callable[[], float]:
        def timed() -> float:
            torch.cuda.synchronize()
            began_at = time.perf_counter()
            put()
            torch.cuda.synchronize()
            return time.perf_counter() - began_at

        return timed

    host_ids = pool.alloc_mem(wanted, Tier.HOST)
    tier = pool._host
    assert host_ids is not None and tier is not None
    out = size / _median(swap(lambda: tier._swaps.store(into, host_ids)))
    yield _share("swap out", out, to_host, SWAP_SHARE)
    back = size / _median(swap(lambda: pool.load(host_ids, into)))
    yield _share("swap in", back, to_device, SWAP_SHARE)
    pool.close()


# --- 5 ---


def measure_engine() -> Iterator[Line]:
    """Whole steps, and the attention of decodes alone, each in its own process: both want much memory."""
    engine = _measured("gpu_engine.py", "--no-reference", "--repeats", "3")
    yield Line(
        "matrix product, bfloat16", f"{engine['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s", "(measured)", True
    )
    for row in engine["rows"]:
        found = f"{row['ours_ms']:.2f} ms, {row['share']:.0%} of the bound"
        yield Line(row["name"], found, f">= {row['floor']:.0%}", row["share"] >= row["floor"])
    name = "decode attention 64 x 4k"
    for case in _measured("kernels.py", "--only", name)["results"]:
        share = case["fraction"]
        found = f"{case['ms']:.3f} ms, {share:.0%} of the bound"
        yield Line(name, found, f">= {KERNEL_SHARE:.0%}", share >= KERNEL_SHARE)


def _measured(script: str, *options: str) -> dict[str, Any]:
    """What a benchmark beside this one has measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *options, "--json", str(path)]
        ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=_MEASURED_S)
        if not path.exists():
            raise RuntimeError(f"{script} failed: {(ran.stderr or ran.stdout)[-2000:]}")
        measured: dict[str, Any] = json.loads(path.read_text())
        return measured


# --- of 4 ---


def _copy_rates(size: int) -> tuple[float, float, float]:
    """Bytes/s of payload: on the device, to pinned memory, from it; of `size` bytes in one copy."""
    import torch

    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target, pinned = torch.empty_like(source), torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def timed(to: torch.Tensor, of: torch.Tensor) -> float:
        def run() -> float:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            to.copy_(of, non_blocking=True)
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3

        return size / _median(run)

    return timed(target, source), timed(pinned, source), timed(target, pinned)


def _median(run: Callable[[], float]) -> float:
    for _ in range(2):
        run()
    return statistics.median(run() for _ in range(_NUM_REPEATS))


def _share(what: str, rate: float, ceiling: float, wanted: float) -> Line:
    share = rate / ceiling
    found = f"{rate / 1e9:.1f} GB/s, {share:.0%} of the copy"
    return Line(what, found, f">= {wanted:.0%}", math.isfinite(share) and share >= wanted)


if __name__ == "__main__":
    sys.exit(main())
