"""Compile every kernel without a GPU: `compile_kernels.py 90` prints registers and memory of each on sm_90; --json too.

Triton's launcher gets a driver that knows only the architecture, and stops before the launch. Its own rules of
specialization (alignment, constants) apply, so the code is the same as on a GPU.
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
        usage = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", f.name], text=True)
    ptx = kernel.asm["ptx"]
    built.append(
        {
            "kernel": f"{self.fn.__module__.split('.')[-1]}.{self.__name__}",
            "shape": shape,
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "wgmma": "wgmma" in ptx,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
        }
    )


JITFunction.run = compile_only
kernels.INTERPRETED = True  # lets the public functions take tensors on the CPU in place of a GPU's


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
    q, k, v = rope.rope(tensor(1, 16, H + 2 * K, D), *rope.rope_table(16, D, 1e4), H, K, "triton")
    (q.sum() + k.sum() + v.sum()).backward()
    attention.attention(tensor(1, 256, H, D), tensor(1, 256, K, D), tensor(1, 256, K, D), "triton").sum().backward()
shape = "float32 D=128"
q = torch.randn(1, 256, 16, 128, requires_grad=True)
attention.attention(q, q, q, "triton").sum().backward()
shape = "V=100277"
x, w, targets = tensor(4, 16), tensor(100_277, 16), torch.randint(9, (4,))
cross_entropy.linear_cross_entropy(x, w, targets, "mean", "triton").backward()
with torch.no_grad():  # as in validation
    cross_entropy.linear_cross_entropy(x, w, targets, "none", "triton")
if "--json" in sys.argv:
    print(json.dumps(built))
else:
    for k in built:
        memory = f"registers {k['registers']:3}  stack {k['stack']:3}  shared {k['shared']:6}"
        print(f"{k['kernel']:24} {k['shape']:16} warps {k['warps']:2}  {memory}  {'wgmma' if k['wgmma'] else ''}")
