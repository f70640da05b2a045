"""A report on the kernel of a network: what ``python -m ntkops report`` computes, draws and writes.

Everything here also works as a library:

    subject = report.digits_subject(samples=100)
    result = report.build(subject)
    result.kernels[0].trace
"""

from .command import add_command
from .drawing import draw_figures, format_estimate, print_report
from .loading import load_data, load_model
from .measures import Convergence, KernelReport, Report, Settings, build
from .record import as_record, write_json
from .subjects import Digits, Subject, accuracy, classifier, digits_subject, load_digits, train, user_subject

__all__ = [
    # what it is about
    "Subject",
    "digits_subject",
    "user_subject",
    "accuracy",
    # digits
    "Digits",
    "load_digits",
    "classifier",
    "train",
    # a user's own
    "load_model",
    "load_data",
    # the numbers
    "Settings",
    "build",
    "Report",
    "KernelReport",
    "Convergence",
    # what is shown and kept
    "print_report",
    "format_estimate",
    "draw_figures",
    "as_record",
    "write_json",
    # the command line
    "add_command",
]
