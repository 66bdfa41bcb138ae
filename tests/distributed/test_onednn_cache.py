"""What the libraries under torch keep for each shape of a product stays small, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sft.distributed import onednn_cache
from tests.runs import ROOT

MEMORY = """
import torch
from sft.distributed.memory import peak_bytes
def grown(shapes):
    before = peak_bytes(torch.device("cpu"))
    for tokens in shapes:
        torch.mm(rows[:tokens], weight, out=room[:tokens])
    return (peak_bytes(torch.device("cpu")) - before) // 2**20
rows, weight = torch.ones(1000, 384, dtype=torch.bfloat16), torch.ones(384, 512, dtype=torch.bfloat16)
room = torch.ones(1000, 512, dtype=torch.bfloat16)
grown([1000, *range(301, 501)])
print(grown(range(501, 901)))
"""


def test_both_caches_are_limited() -> None:
    environ: dict[str, str] = {}
    onednn_cache.limit_onednn_cache(environ)
    assert environ.keys() == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
    assert len(set(environ.values())) == 1


def test_what_the_user_set_stays() -> None:
    environ = {"DNNL_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "9"}
    onednn_cache.limit_onednn_cache(environ)
    assert environ == {"DNNL_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "9"}


@pytest.mark.slow
def test_memory_does_not_grow_with_each_new_number_of_tokens() -> None:
    """400 shapes take some 200 MiB with the libraries' own limits, where oneDNN multiplies in bfloat16."""
    environ = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    onednn_cache.limit_onednn_cache(environ)
    command = [sys.executable, "-c", MEMORY]
    ran = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= 30


@pytest.mark.slow
def test_every_command_sets_them_before_torch_is_there() -> None:
    code = "import os, sys, sft_main; sft_main.main(['schema']); assert 'torch' not in sys.modules; "
    code += "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], file=sys.stderr)"
    environ = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert ran.stderr.strip().isdigit()
