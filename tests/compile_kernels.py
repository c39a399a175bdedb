"""Compile every kernel for a GPU that need not be here: `compile_kernels.py 90` prints what each one takes; --json for a program.

Triton's launcher is given a driver that only knows the architecture, and stops before the launch. Its own rules of
specialization (alignment, constants) apply, so the code is what a GPU would run.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels
from kernels import attention, cross_entropy, rms_norm, rope, swiglu

if len(sys.argv) < 2 or not sys.argv[1].isdecimal():
    sys.exit("compile_kernels.py: error: expected an architecture such as 80 or 90")
ARCH = int(sys.argv[1])
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver.set_active(Driver())
launch, built = JITFunction.run, []


def compile_only(self, *args, grid, warmup, **how):
    kernel = launch(self, *args, grid=grid, warmup=True, **how)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = kernel.asm["ptx"]
    built.append(
        {
            "kernel": f"{self.fn.__module__.split('.')[-1]}.{self.__name__}",
            "shape": shape,
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "registers": int(re.search(r"REG:(\d+)", said)[1]),
            "stack": int(re.search(r"STACK:(\d+)", said)[1]),
            "wgmma": "wgmma" in ptx,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
        }
    )


JITFunction.run = compile_only


kernels.interpreted = lambda: True  # or a tensor on the CPU, which stands in for one on the GPU, would be refused


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)


for C in (512, 1024, 1536, 2048):
    shape = f"C={C}"
    y, z = rms_norm.add_rms_norm(tensor(8, C), tensor(8, C), torch.ones(C, requires_grad=True), 1e-5, "triton")
    (y.sum() + z.sum()).backward()
    rms_norm.rms_norm(tensor(8, C), torch.ones(C, requires_grad=True), 1e-5, "triton").sum().backward()
    shape = f"f={4 * C}"
    swiglu.swiglu(tensor(8, 8 * C), "triton").sum().backward()
for H, K, D in ((8, 8, 64), (16, 16, 96), (32, 32, 64), (32, 8, 128)):
    shape = f"H={H} K={K} D={D}"
    sum(
        t.sum() for t in rope.rope(tensor(1, 16, H + 2 * K, D), *rope.rope_table(16, D, 1e4), H, K, "triton")
    ).backward()
    attention.attention(tensor(1, 256, H, D), tensor(1, 256, K, D), tensor(1, 256, K, D), "triton").sum().backward()
shape = "V=100277"
cross_entropy.linear_cross_entropy(
    tensor(4, 16), tensor(100_277, 16), torch.randint(9, (4,)), "mean", "triton"
).backward()
if "--json" in sys.argv:
    print(json.dumps(built))
else:
    for k in built:
        print(
            f"{k['kernel']:24} {k['shape']:16} warps {k['warps']:2}  registers {k['registers']:3}  stack {k['stack']:3}  shared {k['shared']:6}  {'wgmma' if k['wgmma'] else ''}"
        )
