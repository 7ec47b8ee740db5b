"""Page faults of large tensors tell whether the process gets new memory from the system or takes what it has kept."""

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest

from resbackbone.memory import keep_freed_memory

COUNT = """
import json, resource, torch
from resbackbone import build_resnet_backbone
from resbackbone.memory import keep_freed_memory

def faults():
    for _ in range(2):  # at first, memory that is kept has to be got
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.empty(2**26, dtype=torch.uint8).fill_(1)
        count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return count

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

counts = {"at first": faults()}
build_resnet_backbone(18).to("meta").fuse()
counts["fused, not on a CPU"] = faults()
build_resnet_backbone(18).export("network.pt2")
counts["exported"] = faults()
build_resnet_backbone(18).fuse()
counts["fused"] = faults()
before = resident()
keep_freed_memory(False)
print(json.dumps([counts, before - resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_network_fused_on_a_cpu_has_the_process_keep_freed_memory_until_that_is_ended(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    done = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, cwd=tmp_path, env=plain)
    counts, returned = json.loads(done.stdout)
    kept = counts.pop("fused")
    assert len(counts) == 3 and kept * 10 < min(counts.values()), counts
    assert returned >= 2**26


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_a_c_library_that_cannot_keep_memory_is_left_alone(error, monkeypatch):
    def failing(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", failing)
    keep_freed_memory()
    keep_freed_memory(False)
