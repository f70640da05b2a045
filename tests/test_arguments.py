"""Every option of every public function refuses values of a wrong type, by an exception of ours.

The options, and what they take, are read from the signatures, so that a new option is tested as it comes.
"""

import importlib
import inspect
import math
import re

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

import ntkops
from ntkops.errors import NtkopsError
from ntkops.vectors import Space

ROOMS = ("", ".operators", ".projections", ".solvers", ".distill", ".regression", ".spectra")
CLASSES = ("KernelRidge", "Batches", "Sketch", "Layerwise", "ProjectionOperator")  # that users make


class Word:
    """What no option takes."""

    def __repr__(self):
        return "Word()"


WRONG = {
    "bool": ["yes", 2, 0.5, None, Word()],
    "int": ["3", 2.5, True, Word()],
    "float": ["0.1", True, Word(), [1.0]],
    "str": [3, 2.5, True, Word(), "nonsense"],
    "Generator": [0, "seed", True, Word()],
    "Tensor": ["values", Word()],
}
PATTERNS = {
    "bool": r"\bbool\b",
    "int": r"\bint\b",
    "float": r"\bfloat\b",
    "str": r"\bstr\b|Literal|Method|Choice|Fit|Over|Distribution|Route",
    "Generator": r"Generator",
    "Tensor": r"Tensor",
}
# Words that name a file, a column or a label are no choice among few; what is Any is for others to test.
FREE_WORDS = {"path", "checkpoint", "label", "name", "columns", "params", "output", "device"}


def wrong_values(name, annotation, default):
    """Values of types that an annotation excludes."""
    text = str(annotation)
    kinds = {kind for kind, pattern in PATTERNS.items() if re.search(pattern, text)}
    if not kinds or re.search(r"Any|Callable|Mapping|Product\b|Space|Kernels?\b|Operator|Precond", text):
        return []
    found = []
    for kind in kinds:
        for value in WRONG[kind]:
            if value is None and (default is None or "None" in text):
                continue
            allowed = {
                "bool": isinstance(value, bool) and "bool" in kinds,
                "int": type(value) is int and kinds & {"int", "float"},
                "float": type(value) is float and "float" in kinds,
                "word": value == "nonsense" and "str" in kinds and name in FREE_WORDS,
                "digits": value in ("3", "0.1", "yes", "values", "seed") and "str" in kinds,
                "list": isinstance(value, list) and ("Sequence" in text or "Tensor" in kinds),
            }
            if not any(allowed.values()):
                found.append(value)
    return found


def problem():
    """Arguments by the names that signatures use: a small kernel, and what goes with it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    K = ntkops.ntk(model, x)
    dense = K.to_dense().clone()
    labels = torch.arange(6) % 2
    Y = torch.nn.functional.one_hot(labels).double()
    each = DenseLinearOperator(torch.stack([dense, 2 * dense]))
    U = torch.eye(6, dtype=torch.float64)[:, :3]
    return {
        "model": model,
        "models": [model, model],
        "jacobians": {"u": K.left, "r": K.left},
        "x": x,
        "operator": K,
        "first": K,
        "second": K,
        "third": K,
        "fourth": K,
        "kernel": K,
        "K": K,
        "A": K,
        "M": dense.diagonal().clone(),
        "projection": ntkops.projections.SJLT(K.num_parameters, 5, 0),
        "inducing": [0, 2],
        "columns": 2,
        "source": [x],
        "batch_size": 3,
        "budget": None,
        "dim": 20,
        "k": 4,
        "n": 10,
        "m": 10,
        "epsilon": 0.1,
        "ridge": 0.1,
        "shapes": [(3, 4)],
        "multiply": lambda block: dense @ block + block,
        "coarse": lambda block: dense @ block + block,
        "push": lambda block: dense @ block,
        "pull": lambda block: dense @ block,
        "rhs": Y,
        "space": Space(6, torch.float64),
        "rows": Space(6, torch.float64),
        "function": lambda values: torch.log1p(values),
        "rank": 2,
        "diagonal": dense.diagonal().clone(),
        "generator": torch.Generator().manual_seed(0),
        "Y": Y,
        "s": 2,
        "clusters": 2,
        "variance_threshold": 0.9,
        "gap_threshold": 0.0,
        "distilled": ntkops.distill.Distilled(U),
        "labels": labels,
        "K_cross": K,
        "K_diag": dense.diagonal().clone(),
        "each": each,
        "delta": 0.1,
        "gradients": torch.randn(K.num_parameters, 3, dtype=torch.float64),
        "features": torch.randn(6, 4, dtype=torch.float64),
        "num_points": 2,
        "points_per_class": 1,
        "data": (x.float(), labels),
        "inputs": x,
        "test_inputs": x,
        "jacobian": K.left,
        "projected": K,
        "projected_cross": K,
        "step_size": 0.1,
        "smoothness": 1.0,
        "update": torch.randn(K.num_parameters, dtype=torch.float64),
        "failure": 0.1,
        "freedom": 3.0,
        "level": 0.05,
        "mean": 1.0,
        "variance": 1.0,
        "probes": 9,
        "means": torch.ones(3),
        "variances": torch.ones(3),
        "factor": dense[:, :2],
        "times": [1.0],
        "steps": [1],
        "lr": 0.01,
        "head": "2",
        "weight_variance": 1.0,
        "bias_variance": 0.1,
        "F": torch.randn(9, 3, dtype=torch.float64),
        "F_test": torch.randn(2, 3, dtype=torch.float64),
    }


def public():
    found = {}
    for room in ROOMS:
        module = importlib.import_module("ntkops" + room)
        for name in module.__all__:
            thing = getattr(module, name)
            wanted = (
                inspect.isfunction(thing)
                or name in CLASSES
                or (room == ".projections" and inspect.isclass(thing) and name != "Projection")
            )
            if wanted and thing not in found.values():
                found[f"ntkops{room}.{name}"] = thing
    return found


PUBLIC = public()


def arguments(name, signature, given):
    """The required arguments of a function."""
    short = name.rsplit(".", 1)[-1]
    values = {}
    for parameter in signature.parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            values[parameter.name] = given[parameter.name]
    if short in ("pivoted_cholesky", "rpcholesky"):
        dense = given["operator"].to_dense()
        values["columns"] = lambda index: dense[:, index]
    if short == "track":  # without checkpoints the model is read when it is first recorded
        values["checkpoints"] = [given["model"].state_dict()]
    if short == "class_mean":
        values["K"] = given["each"]
    if short == "balance":
        J = ntkops.stack(given["jacobians"])
        values["operator"] = J @ J.mT
    if short == "lsmr":
        values["columns"] = given["space"]
    if short in ("projection_residual", "one_step_regret"):
        values["projector"] = ntkops.regression.tangent_projector(given["K"].left)
    return values


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return {**problem(), "path": tmp_path_factory.mktemp("files") / "of_arguments"}


@pytest.mark.parametrize("name", [name for name in PUBLIC if ".distill." not in name])
def test_annotations_say_what_is_taken(name):
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert [p.name for p in named if str(p.annotation) == "Any"] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_wrong_types_are_refused(name, given):
    function, failures = PUBLIC[name], []
    signature = inspect.signature(function)
    given = {**given, "projector": None}
    required = arguments(name, signature, given)
    for parameter in signature.parameters.values():
        for value in wrong_values(parameter.name, parameter.annotation, parameter.default):
            try:
                made = function(**{**required, parameter.name: value})
                if name.endswith("KernelRidge"):
                    made.fit(given["K"], given["Y"])
            except NtkopsError:
                continue
            except Exception as error:
                failures.append(f"{parameter.name}={value!r}: {type(error).__name__}: {str(error)[:80]}")
            else:
                failures.append(f"{parameter.name}={value!r}: accepted")
    assert not failures, "\n".join(failures)


# Numbers that may be negative: seeds, positions counted from the end, and values of a quantity.
SIGNED = {"seed", "batch_dim", "outputs", "offset", "mean", "means", "axes", "shape", "output", "params"}
MAY_BE_ZERO = {"deflation", "max_dense_bytes", "num_random", "products", "rank", "iterations"}


# Numbers that estimates compute go into the intervals of spectra, and no user's.
@pytest.mark.parametrize("name", [n for n in PUBLIC if not re.search("scaled_chi|guarded", n)])
def test_counts_and_tolerances_out_of_range_are_refused(name, given):
    function, failures = PUBLIC[name], []
    signature = inspect.signature(function)
    given = {**given, "projector": None}
    required = arguments(name, signature, given)
    for parameter in signature.parameters.values():
        text = str(parameter.annotation)
        if parameter.name in SIGNED or re.search(r"Any|Callable|Sequence|Mapping|Operator", text):
            continue
        values = [-1, 0] if re.search(r"\bint\b", text) else []
        values += [-0.5, float("nan"), float("inf")] if re.search(r"\bfloat\b", text) else []
        for value in values:
            if value == 0 and (parameter.name in MAY_BE_ZERO or "float" in text):
                continue
            if value == math.inf and parameter.name == "checkpoint_every":  # never
                continue
            try:
                made = function(**{**required, parameter.name: value})
                if name.endswith("KernelRidge"):
                    made.fit(given["K"], given["Y"])
            except NtkopsError:
                continue
            except Exception as error:
                failures.append(f"{parameter.name}={value!r}: {type(error).__name__}: {str(error)[:80]}")
            else:
                failures.append(f"{parameter.name}={value!r}: accepted")
    assert not failures, "\n".join(failures)
