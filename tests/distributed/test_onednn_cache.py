"""The caches of compiled kernels are limited, unless the user has set their capacities."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sft.distributed import onednn_cache
from tests.runs import ROOT


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
def test_the_program_sets_them_before_torch_is_imported() -> None:
    code = "import os, sys, sft_main; sft_main.main(['schema']); assert 'torch' not in sys.modules; "
    code += "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], file=sys.stderr)"
    environ = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stderr.strip().isdigit()
