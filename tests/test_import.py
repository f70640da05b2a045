"""What `import ntkops` loads: no library that only some functions need."""

from __future__ import annotations

import graphlib
import subprocess
import sys

import grimp
import pytest
from linear_operator.operators import MatmulLinearOperator, SumLinearOperator

import ntkops
from ntkops import operators
from ntkops.operators.capabilities import Capabilities

LATER = ("matplotlib", "scipy.optimize", "scipy.sparse.linalg", "scipy.stats", "sklearn")


def test_import_leaves_heavy_libraries_for_the_functions_that_use_them():
    """Given axes need no pyplot, either."""
    script = (
        "import sys, ntkops, ntkops.plotting as p\n"
        "print(*sorted(sys.modules))\n"
        "from matplotlib.figure import Figure\n"
        "p.plot_spectrum([2.0, 1.0], Figure().subplots())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "ntkops.estimators" in loaded
    assert [name for name in LATER if name in loaded] == []


_FOREIGN = """
import importlib, sys
import torch
from linear_operator import operators as kinds
from linear_operator.operators import LinearOperator

def results():
    torch.manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64)
    factor = draw(4, 4)
    made = [
        kinds.DenseLinearOperator(factor @ factor.T),
        kinds.DiagLinearOperator(draw(4)),
        kinds.ConstantDiagLinearOperator(draw(1), 4),
        kinds.IdentityLinearOperator(4, dtype=torch.float64),
        kinds.RootLinearOperator(draw(4, 2)),
        kinds.LowRankRootLinearOperator(draw(4, 2)),
        kinds.ToeplitzLinearOperator(torch.tensor([4.0, 1.0, 0.5, 0.1], dtype=torch.float64)),
        kinds.TriangularLinearOperator(draw(4, 4).tril()),
        kinds.KroneckerProductLinearOperator(
            kinds.DenseLinearOperator(draw(2, 2)), kinds.DenseLinearOperator(draw(2, 2))
        ),
        kinds.BlockDiagLinearOperator(kinds.DenseLinearOperator(draw(2, 2, 2))),
    ]
    for one in made[:4]:
        made.append(one.add_diagonal(draw(4)))
    found = []
    for one in made:
        for other in [*made, draw(4, 4), draw(4, 2), draw(4)]:
            for combine in (lambda: one @ other, lambda: one + other):
                try:
                    result = combine()
                    dense = result if isinstance(result, torch.Tensor) else result.to_dense()
                    found.append((type(result).__name__, dense.tolist()))
                except Exception as error:
                    found.append((type(error).__name__, str(error)))
    return found

def depth(method):
    return 1 + depth(method.__wrapped__) if hasattr(method, "__wrapped__") else 0

before = results()
plain = {name: depth(getattr(LinearOperator, name)) for name in ("matmul", "__add__", "add_diagonal")}
import ntkops
assert results() == before
for again in range(3):
    importlib.reload(sys.modules["ntkops.operators.sandwich"])
for name, number in plain.items():
    assert depth(getattr(LinearOperator, name)) == number + 1, name
assert results() == before
print(len(before))
"""


def test_operators_of_others_do_what_they_did_before_the_import():
    # linear_operator's methods that compose are given a rule for operators of ours, once however often the
    # module is loaded; without one of ours their results have the same kinds and the same bits.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _FOREIGN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 400


def test_no_module_imports_in_a_circle():
    # Imports for typing and inside functions count: who follows one never comes back to where he was.
    graph = grimp.build_graph("ntkops", exclude_type_checking_imports=False, cache_dir=None)
    faces = {name for name in graph.modules if graph.find_children(name)}
    known = {name: graph.find_modules_directly_imported_by(name) - faces for name in graph.modules - faces}
    assert len(list(graphlib.TopologicalSorter(known).static_order())) >= len(known)


def test_each_operator_of_ours_says_itself_what_it_can_do():
    kinds = [kind for kind in map(operators.__dict__.get, operators.__all__) if isinstance(kind, type)]
    own = {kind for kind in kinds if issubclass(kind, Capabilities)}
    products = (MatmulLinearOperator, SumLinearOperator)  # which are asked by their parts
    assert {kind for kind in kinds if kind not in own and not issubclass(kind, products)} == {
        operators.JacobianOperator,
        operators.FeatureOperator,
        operators.ProjectionOperator,
    }  # which can be multiplied alone


@pytest.mark.parametrize("name", ["ntk", "projected_ntk", "gradient_features", "GradientFeatures"])
def test_names_that_have_moved_are_found_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=rf"use ntkops\.{name}"):
        assert getattr(operators, name) is getattr(ntkops, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = operators.nothing
