"""What `import ntkops` loads: no library that only some functions need."""

from __future__ import annotations

import subprocess
import sys

LATER = ("matplotlib", "scipy.optimize", "scipy.sparse.linalg", "scipy.stats", "sklearn")


def test_import_leaves_heavy_libraries_for_the_functions_that_use_them():
    script = "import sys, ntkops; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "ntkops.estimators" in loaded
    assert [name for name in LATER if name in loaded] == []
