"""J composed with what curvature libraries compute: predictive variances and Gauss-Newton products."""

import pytest
import torch
from torch import nn

import ntkops


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def dense_jacobian(network, x):
    parameters = dict(network.named_parameters())
    blocks = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, (x,)))(parameters)
    return torch.cat([b.detach().flatten(2) for b in blocks.values()], 2).flatten(0, 1)


def test_predictive_variance_on_both_sides(network):
    """J* (Jᵀ J / s² + a I)⁻¹ J*ᵀ, P x P, equals (K** - K*X (K + s² a I)⁻¹ KX*) / a, n x n."""
    x, x_new = torch.randn(7, 3).double(), torch.randn(4, 3).double()
    noise, precision = 0.2, 1.7
    J, J_new = dense_jacobian(network, x), dense_jacobian(network, x_new)
    posterior = J.T @ J / noise + precision * torch.eye(J.shape[1], dtype=torch.float64)
    weight_side = J_new @ torch.linalg.solve(posterior, J_new.T)

    K = ntkops.ntk(network, x)
    cross, own = K.cross(x_new), ntkops.ntk(network, x_new)
    solved = torch.linalg.solve(K.add_jitter(noise * precision).to_dense(), cross.to_dense().T)
    function_side = (own.to_dense() - cross @ solved) / precision
    torch.testing.assert_close(function_side, weight_side, rtol=1e-9, atol=1e-11)
    # the same from our J and Jᵀ by products alone
    ours = ntkops.jacobian(network, x, max_dense_bytes=0)
    push = ours @ (ours.mT @ torch.eye(len(J), dtype=torch.float64))
    torch.testing.assert_close(push, J @ J.T, rtol=1e-10, atol=1e-11)


def cross_entropy_hessian(logits):
    """Return H of the mean cross-entropy in the logits, (N·O, N·O), block diagonal over samples."""
    p = logits.softmax(1)
    return torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(p)


def gauss_newton_product(network, x, v, weigh):
    """Return Jᵀ H J v for columns of v by our products."""
    J = ntkops.jacobian(network, x, max_dense_bytes=0)
    return J.mT @ (weigh @ (J @ v))


def test_gauss_newton_by_torch_func(network):
    x = torch.randn(5, 3).double()
    y = torch.tensor([0, 1, 2, 1, 0])
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    v = torch.randn(sum(p.numel() for p in parameters.values()), 2).double()

    def loss(logits):
        return nn.functional.cross_entropy(logits, y)

    def output(p):
        return torch.func.functional_call(network, p, (x,))

    expected = []
    for column in v.T:
        pieces = column.split([p.numel() for p in parameters.values()])
        tangent = {n: piece.view_as(p) for (n, p), piece in zip(parameters.items(), pieces, strict=True)}
        logits, moved = torch.func.jvp(output, (parameters,), (tangent,))
        weighted = torch.func.jvp(torch.func.grad(loss), (logits,), (moved,))[1]
        pulled = torch.func.vjp(output, parameters)[1](weighted)[0]
        expected.append(torch.cat([part.flatten() for part in pulled.values()]))
    found = gauss_newton_product(network, x, v, cross_entropy_hessian(network(x).detach()))
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["cross-entropy", "squares"])
def test_gauss_newton_of_curvlinops(network, kind):
    curvlinops = pytest.importorskip("curvlinops")
    x = torch.randn(5, 3).double()
    if kind == "squares":
        loss, y = nn.MSELoss(), torch.randn(5, 3).double()
        weigh = 2.0 / y.numel() * torch.eye(15, dtype=torch.float64)
    else:
        loss, y = nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 1, 0])
        weigh = cross_entropy_hessian(network(x).detach())
    parameters = list(network.parameters())
    theirs = curvlinops.GGNLinearOperator(network, loss, parameters, [(x, y)], check_deterministic=False)
    v = torch.randn(theirs.shape[1], 3).double()
    torch.testing.assert_close(
        gauss_newton_product(network, x, v, weigh), (theirs @ v).detach(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore")
def test_jacobians_of_curvlinops(network):
    curvlinops = pytest.importorskip("curvlinops")
    x = torch.randn(5, 3).double()
    data = [(x, torch.zeros(5, 3).double())]
    parameters = list(network.parameters())
    theirs = curvlinops.JacobianLinearOperator(network, parameters, data, check_deterministic=False)
    ours = ntkops.jacobian(network, x)
    v, u = torch.randn(ours.shape[1], 2).double(), torch.randn(ours.shape[0], 2).double()
    torch.testing.assert_close(ours @ v, (theirs @ v).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        ours.mT @ u, torch.as_tensor(theirs.adjoint() @ u).detach(), rtol=1e-10, atol=1e-12
    )
