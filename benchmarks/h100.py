"""Programs compiled for an H100 on a machine without one: kernels launched by an update or a frame,
memory, compile time. Nothing is run.

    python -m pip install --target FOLDER --no-deps jax-cuda12-pjrt==VERSION jax-cuda12-plugin==VERSION
      nvidia-cuda-nvcc-cu12            # 600 MB; VERSION is that of jaxlib
    python benchmarks/h100.py --compiler FOLDER --out results/bench/h100_compiled.json
      [--programs 'dreamer_v3 12m image' ...] [--before OTHER.json]

A launch is an instruction of the optimised program that starts a kernel, a copy or a library's
product, times the trips of the loops around it; `copies` are those that only move data. Autotuning,
which needs the card, is off, so products may be other kernels there; the count of launches of an
update agreed with a profile on an H100 within 1%. Programs that are in --out already and are not
named stay as they are; --before keeps the figures of a results file of an older version beside.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from reverie.agents import registry
from reverie.agents.dreamer import Dreamer
from reverie.agents.dreamer.presets import dreamer_v3
from reverie.commands.bench.phases import RandomBatches
from reverie.errors import UserError
from reverie.evaluation.results import provenance, save
from reverie.training.state import create
from reverie.training.update import make_program
from reverie.types import ActionSpace, Agent, EnvSpec, Phase

# Properties of the card, as its driver tells them.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  model_str: "sm_9.0a with 84942979072B RAM, 132 cores, 1980000KHz clock, 2619000KHz mem clock, 52428800B L2$"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  pcie_bandwidth: 34359738368
  device_address_bits: 64
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
IMAGE, VECTOR = (64, 64, 3), (400,)


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Environment of a process that compiles; raises UserError if `folder` holds no compiler."""
    nvcc = folder / 'nvidia' / 'cuda_nvcc'
    if not (nvcc / 'bin' / 'ptxas').exists() or not (folder / 'jax_plugins').exists():
        raise UserError(
            f'--compiler {folder}: expected a folder that pip installed into, see --help'
        )
    own = os.environ.get
    return {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_ENABLE_COMPILATION_CACHE': 'false',
        'PATH': f'{nvcc / "bin"}:{own("PATH", "")}',
        'PYTHONPATH': f'{folder}:{own("PYTHONPATH", "")}',  # JAX looks for plug-ins there
        'XLA_FLAGS': f'{own("XLA_FLAGS", "")} --xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0',
    }


def card() -> Any:
    """Device to compile for, which does not exist."""
    found = topologies.get_topology_desc(
        '1x1x1', platform='cuda', topology='1x1x1', target_config=H100
    )
    return found.devices[0]


Lowered = Callable[[Any], Any]


def update_of(agent: Agent, phase: Phase) -> Lowered:
    """One update of a phase on random batches, lowered for a device."""
    source = RandomBatches(agent.spec)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    begin = jax.vmap(lambda key: create(agent.init(key), phase))
    state, fixed = jax.eval_shape(begin, keys), jax.eval_shape(phase.fixed)
    program = make_program(phase, source)

    def lowered(device: Any) -> Any:
        where = SingleDeviceSharding(device)
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        args = jax.tree.map(put, (state, source.data, None, keys, fixed))
        return program.call.trace(*args, updates=1).lower(lowering_platforms=('cuda',))

    return lowered


def v3(size: str, shape: tuple[int, ...]) -> Lowered:
    agent = Dreamer(dreamer_v3(size), EnvSpec('noise', shape, ActionSpace('discrete', 6)))
    return update_of(agent, agent.phases[0])


def phase_of(preset: str, shape: tuple[int, ...], number: int) -> Lowered:
    agent = registry.make(registry.get(preset), EnvSpec('noise', shape, ActionSpace('discrete', 6)))
    return update_of(agent, agent.phases[number])


PROGRAMS: dict[str, Callable[[], Lowered]] = {
    'dreamer_v3 12m image': lambda: v3('12m', IMAGE),
    'dreamer_v3 12m vector': lambda: v3('12m', VECTOR),
    'dreamer_v3 1m vector': lambda: v3('1m', VECTOR),
    'dreamer_v3 200m image': lambda: v3('200m', IMAGE),
    'dreamer4_image_gpu tokenizer': lambda: phase_of('dreamer4_image_gpu', IMAGE, 0),
}

# Instructions that start nothing on the card.
FREE = {
    'after-all', 'async-done', 'bitcast', 'constant', 'copy-done', 'get-tuple-element',
    'opt-barrier', 'parameter', 'partition-id', 'replica-id', 'tuple',
}  # fmt: skip
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)')


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation of a program's text, and the name of the one it begins with."""
    found: dict[str, list[str]] = {}
    entry, lines = '', list[str]()
    for line in text.splitlines():
        head = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
        if head:
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(' '):
            lines.append(line)
    return found, entry


def opcode(definition: str) -> str:
    """Name of the operation in `type operation(operands), ...`; types may be nested tuples."""
    depth = 0
    for i, letter in enumerate(definition):
        depth += (letter == '(') - (letter == ')')
        if letter == ' ' and not depth:
            found = re.match(r'[\w\-]+', definition[i + 1 :])
            return found[0] if found else ''
    return ''


def launches(found: dict[str, list[str]], name: str) -> collections.Counter[str]:
    """Count what a computation starts, by kind, the bodies of its loops once for every trip."""
    total: collections.Counter[str] = collections.Counter()
    for line in found[name]:
        parts = INSTRUCTION.match(line)
        if not parts or (kind := opcode(parts[2])) in FREE:
            continue
        called = re.search(r'(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)', parts[2])
        if kind == 'while':
            trips = re.search(r'known_trip_count\D+(\d+)', parts[2])
            if called is None or trips is None:
                raise UserError(f'a loop of unknown length: {line.strip()[:200]}')
            for inner, count in launches(found, called[1]).items():
                total[inner] += count * int(trips[1])
        elif kind in ('call', 'conditional', 'async-start') and called is not None:
            total += launches(found, called[1])
        else:
            total[re.sub(r'[.\d]+$', '', parts[1]) if kind == 'fusion' else kind] += 1
    return total


def figures(lowered: Any) -> dict[str, Any]:
    """Compile, count, and return what the results file holds of a program."""
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    kinds = launches(*computations(compiled.as_text()))
    memory = compiled.memory_analysis()
    copies = sum(n for kind, n in kinds.items() if kind.startswith(('copy', 'wrapped_copy')))
    return {
        'launches': sum(kinds.values()),
        'copies': copies,
        'kinds': dict(kinds.most_common(16)),
        'temp_bytes': memory.temp_size_in_bytes,
        'argument_bytes': memory.argument_size_in_bytes,
        'peak_bytes': memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        'compile_seconds': round(seconds, 1),
    }


def measured(name: str, compiler: pathlib.Path) -> dict[str, Any]:
    """Figures of a program, compiled by a process of its own."""
    command = [sys.executable, __file__, '--compile', name]
    done = subprocess.run(command, env=environment(compiler), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f'{name}: its compilation ended with exit code {done.returncode}')
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(args: argparse.Namespace) -> None:
    """Measure programs; write the results after each."""
    command = f'python benchmarks/h100.py --compiler FOLDER --out {args.out}'
    origin = provenance()  # before --out makes the checkout a changed one
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    programs, before = known.get('programs', {}), known.get('before')
    if args.before:
        older = json.loads(args.before.read_text())
        before = {key: older[key] for key in ('commit', 'programs')}
    for name in args.programs:
        programs[name] = measured(name, args.compiler)
        shown = {key: x for key, x in programs[name].items() if key != 'kinds'}
        print(f'{name}: {json.dumps(shown)}', flush=True)
        result = {'command': command, **origin}
        result |= {'device': 'NVIDIA H100 80GB HBM3, compiled for, not run on'}
        result |= {'programs': programs} | ({'before': before} if before else {})
        save(args.out, result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--compiler', type=pathlib.Path, metavar='FOLDER')
    parser.add_argument('--out', type=pathlib.Path)
    parser.add_argument('--programs', nargs='*', default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument('--before', type=pathlib.Path, help='results of an older version')
    parser.add_argument('--compile', choices=PROGRAMS, help=argparse.SUPPRESS)  # a child's task
    args = parser.parse_args(arguments)
    if args.compile:
        print(json.dumps(figures(PROGRAMS[args.compile]()(card()))))
        return 0
    if args.compiler is None or args.out is None:
        parser.error('expected --compiler and --out')
    try:
        run(args)
    except UserError as error:
        print(f'h100.py: {error}', file=sys.stderr)
        return error.code
    return 0


if __name__ == '__main__':
    sys.exit(main())
