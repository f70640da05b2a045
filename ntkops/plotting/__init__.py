"""Drawings of results: spectra, classes, estimates with their errors, errors against passes.

Every function draws on the axes it is given, or on new ones, and returns them. None shows a window, changes a
style or keeps state: titles, limits and saving are the caller's. Colours are told apart with every common
kind of colour blindness, and lines that share a colour differ in their dashes; ``plt.rc("axes",
prop_cycle=plt.cycler(color=plotting.COLOURS))`` gives them to drawings of your own.
"""

from ._axes import COLOURS
from .distillation import (
    plot_by_size,
    plot_chain,
    plot_cluster_variance,
    plot_coverage_gap,
    plot_images,
    plot_local_containment,
    plot_local_global_grid,
    plot_properties,
)
from .estimates import plot_error_against_passes, plot_estimates
from .kernels import plot_kernel, plot_partition
from .regression import plot_calibration, plot_label_energy, plot_ridge_path
from .spectra import plot_class_spectra, plot_spectral_density, plot_spectrum, plot_truncation_ranks
from .training import plot_history, plot_losses, plot_outputs

__all__ = [
    # the palette
    "COLOURS",
    # spectra
    "plot_spectrum",
    "plot_class_spectra",
    "plot_truncation_ranks",
    "plot_spectral_density",
    # estimates
    "plot_estimates",
    "plot_error_against_passes",
    # regression
    "plot_ridge_path",
    "plot_label_energy",
    # uncertainty
    "plot_calibration",
    # distillation
    "plot_by_size",
    "plot_chain",
    "plot_local_global_grid",
    "plot_properties",
    "plot_local_containment",
    "plot_cluster_variance",
    "plot_coverage_gap",
    "plot_images",
    # along training
    "plot_history",
    "plot_losses",
    "plot_outputs",
    # parts of the parameters
    "plot_partition",
    # dense blocks
    "plot_kernel",
]
