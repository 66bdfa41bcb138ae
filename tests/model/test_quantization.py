"""Importing bitsandbytes does not import torch's compiler, and what it compiles still works."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
def test_the_import_does_not_import_the_compiler_and_compiled_functions_run() -> None:
    code = """
import sys
from sft.model.quantization import import_bitsandbytes
bnb = import_bitsandbytes()
import torch
assert "torch._inductor.compile_fx" not in sys.modules
weight = torch.nn.Parameter(torch.ones(4096))
weight.grad = torch.ones(4096)
optimizer = bnb.optim.AdamW8bit([weight], lr=0.1, min_8bit_size=1)
optimizer.step()
assert optimizer.state[weight]["state1"].dtype == torch.uint8
assert abs(float(weight.detach().mean()) - 0.9) < 0.01
assert torch.compile.__module__ == "torch"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
