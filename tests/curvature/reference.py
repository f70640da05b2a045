"""Networks and the dense Gauss-Newton matrix of a loss, by torch alone."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 3


class Tokens(nn.Module):
    """Scores of the next token at each position, ``(N, T, C)``, of a recurrent mixture of positions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embedding(x).cumsum(1))))


def network(name, dtype=torch.float64):
    """Return a network and its samples, the same for all tests, and class numbers of one's own."""
    model, x, y = _network(name, dtype)
    return model, x, y.clone()


@functools.cache
def _network(name, dtype):
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        if name == "mlp":
            model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        elif name == "small":  # fewer parameters than outputs
            model = nn.Linear(2, CLASSES)
        elif name == "convolution":
            model = nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES, bias=False)
            )
        elif name == "pixels":  # classes are the first axis of the output of a sample
            model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, CLASSES, 1))
        else:
            model = Tokens()
    shapes = {"mlp": (5, 3), "small": (7, 2), "convolution": (4, 1, 4, 4), "pixels": (3, 1, 3, 3)}
    if name == "tokens":
        x, positions = torch.randint(6, (3, 4), generator=generator), (3, 4)
    else:
        x = torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype)
        positions = (3, 2, 2) if name == "pixels" else (len(x),)
    return model.to(dtype), x, torch.randint(CLASSES, positions, generator=generator)


def doubled(model, x):
    """Return copies in double precision."""
    return copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x


def dense_jacobian(model, x):
    """Return outputs and their derivatives by all parameters, ``(N, *tail)`` and ``(N, *tail, P)``."""
    model, x = doubled(model, x)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values):
        return torch.func.functional_call(model, values, (x,))

    found = outputs(params)
    parts = torch.func.jacrev(outputs)(params)
    return found.detach(), torch.cat([part.flatten(found.dim()) for part in parts.values()], dim=-1)


def dense_ggn(model, x, loss):
    """Return the Hessian of a loss of the linearised network in the parameters, ``(P, P)``."""
    outputs, jacobian = dense_jacobian(model, x)
    steps = torch.zeros(jacobian.shape[-1]).double()
    return torch.func.hessian(lambda step: loss(outputs + jacobian @ step))(steps)


def empirical(model, x, losses):
    """Return Σ gradient gradientᵀ of the losses of single samples, from autograd one by one."""
    model, x = doubled(model, x)
    found = 0.0
    for loss in losses(model(x)):
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gradient = torch.cat([part.flatten() for part in parts])
        found = found + torch.outer(gradient, gradient)
    return found


def cross_entropy(y, reduction="sum"):
    """Return torch's cross-entropy of outputs with the classes last."""
    return lambda f: F.cross_entropy(f.flatten(0, -2), y.flatten(), reduction=reduction)


def squares(targets, reduction="sum"):
    return lambda f: F.mse_loss(f, targets.double(), reduction=reduction)


def huber(f, y):
    return F.huber_loss(f, y, delta=0.6, reduction="sum")
