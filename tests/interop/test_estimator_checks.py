"""scikit-learn's own checks of an estimator: only those fail that a policy of ours rules out."""

import numpy as np
import pytest

from ntkops.errors import NotFittedError
from ntkops.regression import KernelRidge

checks = pytest.importorskip("sklearn.utils.estimator_checks")
exceptions = pytest.importorskip("sklearn.exceptions")

# Class numbers are no labels to regress on (KernelRidge says how to make one-hot targets of them).
INTEGER_LABELS = {
    "check_all_zero_sample_weights_error",
    "check_dict_unchanged",
    "check_dtype_object",
    "check_dont_overwrite_parameters",
    "check_estimators_dtypes",
    "check_estimators_fit_returns_self",
    "check_estimators_overwrite_params",
    "check_estimators_pickle",
    "check_f_contiguous_array_estimator",
    "check_fit2d_1feature",
    "check_fit2d_1sample",
    "check_fit2d_predict1d",
    "check_fit_score_takes_y",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_pipeline_consistency",
    "check_positive_only_tag_during_fit",
    "check_readonly_memmap_input",
    "check_regressors_int",
    "check_sample_weights_list",
    "check_sample_weights_not_an_array",
    "check_supervised_y_2d",
}
# A kernel less a constant, or cut to integers, is not positive semidefinite.
NO_KERNELS = {"check_estimators_dtypes", "check_positive_only_tag_during_fit"}


class OnFloats(KernelRidge):
    """What a user does who takes class numbers for numbers."""

    def fit(self, K, Y, sample_weight=None, **options):
        return super().fit(K, _floats(Y), sample_weight=sample_weight, **options)

    def score(self, K_cross, y, **options):
        return super().score(K_cross, _floats(y), **options)


def _floats(labels):
    whole = labels is not None and np.asarray(labels).dtype.kind in "iu"
    return np.asarray(labels).astype(float) if whole else labels


@pytest.mark.parametrize(("kind", "allowed"), [(KernelRidge, INTEGER_LABELS), (OnFloats, NO_KERNELS)])
@pytest.mark.filterwarnings("ignore")
def test_only_what_a_policy_rules_out_fails(kind, allowed):
    found = checks.check_estimator(kind(), on_fail=None, on_skip=None)
    failed = {result["check_name"] for result in found if result["status"] == "failed"}
    assert failed == allowed
    assert sum(result["status"] == "passed" for result in found) > 30


def test_their_class_catches_our_error():
    for kind in (NotFittedError, exceptions.NotFittedError, ValueError, AttributeError):
        with pytest.raises(kind, match="not fitted"):
            KernelRidge().predict(np.eye(3))


def test_arrays_and_lists_for_arrays_and_lists():
    K, y = 2 * np.eye(4), [1.0, 2.0, 3.0, 4.0]
    fitted = KernelRidge(1.0, relative=False).fit(K.tolist(), y)
    found = fitted.predict(K.astype(np.float32))
    assert isinstance(found, np.ndarray) and np.allclose(found, 2 / 3 * np.array(y))
    assert fitted.fit(K.astype(object), np.array(y, dtype=np.float32)).score(K, y) < 1
