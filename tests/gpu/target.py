"""GPUs that need not be here: a program compiled for one, and what the compiler says of its kernels.

XLA takes a card's description in place of the card. It writes each kernel's PTX and the list of what the program
launches into a folder, and ``ptxas``, which it calls itself, says how many registers a kernel takes and how many bytes
it spills.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Else the plugin asks for a GPU, and leaves its compiler out where there is none.
jax.config.update("jax_platforms", "cpu")


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        name: as its driver has it.
        capability: the version of its instructions, major; the minor one is 0.
        multiprocessors: how many.
        shared_memory: bytes of a multiprocessor.
        block_limit: bytes of them that one block may take.
        matrix_rate: floating-point operations that a multiprocessor's matrix units do in a cycle, in bfloat16.
        fma_lanes, special_lanes: float32 multiply-adds, and powers of two, that it does in a cycle.
        clock: cycles per second.
        memory, bandwidth: bytes, and bytes per second.
        cache: bytes of its second-level cache.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int
    block_limit: int
    matrix_rate: int
    fma_lanes: int
    special_lanes: int
    clock: float
    memory: int
    bandwidth: float
    cache: int

    @property
    def description(self) -> str:
        """The card as XLA reads it."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 8 }}
            runtime_version {{ major: 12 minor: 9 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} }}
              core_count: {self.multiprocessors}
              fpus_per_core: {self.fma_lanes}
              clock_rate_ghz: {self.clock / 1e9}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: {32 * WARPS}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: {REGISTERS}
              registers_per_block_limit: {REGISTERS}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.block_limit}
              shared_memory_per_core: {self.shared_memory}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.cache}
            }}"""


# What a multiprocessor of both cards has.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32

H100 = Card(
    name="NVIDIA H100 80GB HBM3",
    capability=9,
    multiprocessors=132,
    shared_memory=228 << 10,
    block_limit=227 << 10,
    matrix_rate=4096,
    fma_lanes=128,
    special_lanes=16,
    clock=1.83e9,
    memory=80 << 30,
    bandwidth=3.35e12,
    cache=50 << 20,
)
A100 = Card(
    name="NVIDIA A100-SXM4-40GB",
    capability=8,
    multiprocessors=108,
    shared_memory=164 << 10,
    block_limit=163 << 10,
    matrix_rate=2048,
    fma_lanes=64,
    special_lanes=16,
    clock=1.41e9,
    memory=40 << 30,
    bandwidth=1.555e12,
    cache=40 << 20,
)
CARDS = {"H100": H100, "A100": A100}


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a Pallas kernel.

    Args:
        name: of the ``pallas_call``.
        threads: of a block.
        registers: of a thread.
        spilled: bytes of a thread's registers that are stored to memory.
        shared_memory: bytes of a block.
        instructions: how often each stands in the PTX.
        loops: the same of each of its innermost loops.
    """

    name: str
    threads: int
    registers: int
    spilled: int
    shared_memory: int
    instructions: Counter[str]
    loops: Sequence[Counter[str]]

    def count(self, prefix: str) -> int:
        """How many instructions begin so, such as ``cp.async``."""
        return sum(times for name, times in self.instructions.items() if name.startswith(prefix))

    def products(self, loop: Counter[str]) -> int:
        """How many multiply-adds of matrices all the threads of a block do in one round of a loop."""
        total = 0
        for name, times in loop.items():
            if (shape := _MATRIX.match(name)) is not None:
                m, n, k = map(int, shape.groups()[1:])
                total += times * m * n * k * self.threads // (128 if shape[1] == "wgmma" else 32)
        return total

    def over_tiles(self) -> tuple[Counter[str], Counter[str]]:
        """The loop over PARTIAL tiles and that over FULL ones. Where there is only one, it is both."""
        loops = [loop for loop in self.loops if self.products(loop)]
        return loops[0], loops[-1]

    def resident(self, card: Card) -> int:
        """How many of its blocks a multiprocessor holds at once."""
        warps = self.threads // 32
        # Registers are given to a warp by 256, shared memory to a block by 128 bytes, of which 1,024 are the driver's.
        by_registers = REGISTERS // (warps * -(-32 * self.registers // 256) * 256)
        taken = (-(-self.shared_memory // 128) * 128) + 1024
        return min(BLOCKS, WARPS // warps, by_registers, card.shared_memory // taken)

    def occupancy(self, card: Card) -> float:
        """The part of the warps that a multiprocessor can hold."""
        return self.resident(card) * self.threads / (32 * WARPS)


@dataclass(frozen=True)
class Program:
    """What the compiler made of a function.

    Args:
        kernels: those of Pallas, in the order of their launch.
        others: the names of what else is launched: kernels of XLA's own, copies, calls of libraries.
        depths: how many launches stand in no loop of XLA's, in one, in two, one within the other; in both branches.
        temporaries: bytes that the program takes beside its arguments and results.
        written: the shapes of the arrays that the program writes to memory; not those inside of a kernel.
    """

    kernels: Sequence[Kernel]
    others: Sequence[str]
    depths: Counter[int]
    temporaries: int
    written: Sequence[tuple[int, ...]]


@cache
def _sharding(card: Card) -> SingleDeviceSharding:
    topology = topologies.get_topology_desc(platform="cuda", target_config=card.description, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


def compile_for(card: Card, function: Callable[..., Any], *arguments: Any) -> Program:
    """The program that ``function`` becomes on a card; ``arguments`` are pytrees of arrays, or of what has their shape.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses it; where a block takes more shared memory than there is, it
            says ``RESOURCE_EXHAUSTED``.
        subprocess.CalledProcessError: ``ptxas`` does.
    """
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(card)), arguments)
    lowered = jax.jit(function).trace(*specs).lower()
    with TemporaryDirectory() as folder:
        memory: Any = lowered.compile(compiler_options={"xla_dump_to": folder}).memory_analysis()
        return _read(Path(folder), memory.temp_size_in_bytes)


_LAUNCH = re.compile(
    r"^(?P<indent> *)(?P<id>\d+): (?P<kind>k\w+) +\[.*?\] *(?P<name>\S*)"
    r"(?: grid: .*? threads: \[(?P<threads>.*?)\] +shared_memory: (?P<shared_memory>\d+) bytes)?",
    re.MULTILINE,
)
# What launches nothing itself, but what it holds.
_HOLDS = "kConditional", "kDynamicSliceFusion", "kWhile"
# An instruction of matrix units, by a warp or, wgmma, by four.
_MATRIX = re.compile(r"(wgmma|mma)\..*?\.m(\d+)n(\d+)k(\d+)\.")
_ANNOTATION = re.compile(r'profile_annotation: "(.*?)"\s+thunk_id: (\d+)')
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)^\}", re.DOTALL | re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+(?:@!?%\w+\s+)?([a-z][\w.:]*)", re.MULTILINE)
# From a label to a branch back to it, with no other label between the two.
_LOOP = re.compile(r"^(\$L\w+):\n((?:(?!\$L\w+:).*\n)*?).*\bbra\S*\s+\1;", re.MULTILINE)
_VALUE = re.compile(r"^ value: .*: \w+\[([\d,]+)\]", re.MULTILINE)
_USAGE = re.compile(r"(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)


def _read(folder: Path, temporaries: int) -> Program:
    """What XLA has written to a folder."""

    def text(name: str) -> str:
        (path,) = folder.glob(f"*{name}")
        return path.read_text(encoding="utf-8")

    sources: dict[str, Path] = {}
    for path in folder.glob("*.ptx"):
        sources |= {name: path for name, _ in _ENTRY.findall(path.read_text(encoding="utf-8"))}
    called = {number: name for name, number in _ANNOTATION.findall(text("thunk_metadata.txt"))}
    launches = [match.groupdict() for match in _LAUNCH.finditer(text("thunk_sequence.txt"))]
    ours = [launch for launch in launches if called.get(str(int(launch["id"])), "").startswith("pallas_call")]
    # An allocation that holds an argument is none that the program makes.
    allocations = text("-buffer-assignment.txt").split("\nallocation ")
    made = [each for each in allocations if ", parameter " not in each.partition("\n")[0]]
    return Program(
        kernels=[_kernel(launch, sources[launch["name"]]) for launch in ours],
        others=[launch["name"] for launch in launches if launch not in ours and launch["kind"] not in _HOLDS],
        depths=_depths(launches),
        temporaries=temporaries,
        written=[tuple(map(int, dims.split(","))) for each in made for dims in _VALUE.findall(each)],
    )


def _depths(launches: Sequence[Mapping[str, str]]) -> Counter[int]:
    found: Counter[int] = Counter()
    loops: list[int] = []
    for launch in launches:
        indent = len(launch["indent"])
        loops = [loop for loop in loops if loop < indent]
        if launch["kind"] == "kWhile":
            loops.append(indent)
        elif launch["kind"] not in _HOLDS:
            found[len(loops)] += 1
    return found


def _kernel(launch: Mapping[str, str], source: Path) -> Kernel:
    written = source.read_text(encoding="utf-8")
    (architecture,) = re.findall(r"^\.target (\w+)", written, re.MULTILINE)
    command = [_ptxas(), "--verbose", f"--gpu-name={architecture}", "--output-file=/dev/null", str(source)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    ((spilled, registers),) = _USAGE.findall(said)
    return Kernel(
        name=launch["name"],
        threads=prod(map(int, launch["threads"].split(","))),
        registers=int(registers),
        spilled=int(spilled),
        shared_memory=int(launch["shared_memory"]),
        instructions=Counter(_INSTRUCTION.findall(written)),
        loops=[Counter(_INSTRUCTION.findall(body)) for _, body in _LOOP.findall(written)],
    )


@cache
def _ptxas() -> str:
    """The program that comes with nvidia-cuda-nvcc-cu12."""
    spec = find_spec("nvidia.cuda_nvcc")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "bin" / "ptxas")
