"""Distillation of data and of gradients: fewer gradients that do the work of many."""

from .barycenter import wasserstein_barycenter
from .chain import chain
from .class_mean import class_mean
from .clusters import random_clusters, spectral_clusters
from .coverage import reconstruction_error, variance_coverage
from .distilled import Distilled
from .inducing import kernel_inducing
from .local_global import local_global
from .local_global_search import local_global_grid, search_local_global
from .properties import containment, local_global_properties
from .ridge import DistilledRidge
from .select import select
from .select_inputs import select_inputs
from .synthesize import synthesize
from .transfer import nystrom_error, posterior_variance_error, transfer_accuracy
from .wasserstein import wasserstein

__all__ = [
    # the currency
    "Distilled",
    "DistilledRidge",
    "class_mean",
    # all stages
    "chain",
    # data
    "select_inputs",
    "wasserstein",
    "wasserstein_barycenter",
    "kernel_inducing",
    # gradients
    "select",
    "synthesize",
    "local_global",
    "search_local_global",
    "local_global_grid",
    # clusters
    "spectral_clusters",
    "random_clusters",
    # diagnostics
    "variance_coverage",
    "reconstruction_error",
    "local_global_properties",
    "containment",
    # other targets, variances, kernels
    "transfer_accuracy",
    "posterior_variance_error",
    "nystrom_error",
]
