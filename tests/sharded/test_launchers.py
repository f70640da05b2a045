"""The same operator in a script that torchrun or accelerate has started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).with_name("script.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def run(launcher, options, folder):
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *options]
    done = subprocess.run(command, env=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def check(found):
    assert [part["ranks"] for part in found] == [2, 2]
    assert sum(part["samples"] for part in found) == 23
    for part in found:
        assert part["trace"] < 1e-10 and part["prediction"] < 1e-8


def test_torchrun(tmp_path):
    check(run(TORCHRUN, [], tmp_path))


def test_accelerate_with_a_wrapped_model_and_batches(tmp_path):
    pytest.importorskip("accelerate")
    check(run(ACCELERATE, ["--accelerate"], tmp_path))
