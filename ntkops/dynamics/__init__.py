"""Training of the linearised network: trajectories with error bounds, and ensembles of them."""

from .ensemble import Gaussian
from .gradient_descent import gradient_descent, max_learning_rate
from .gradient_flow import gradient_flow
from .trajectory import Trajectory

__all__ = ["Gaussian", "Trajectory", "gradient_descent", "gradient_flow", "max_learning_rate"]
