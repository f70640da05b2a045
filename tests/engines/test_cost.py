"""The cost model picks the side that the arithmetic favours."""

import pytest

from ntkops.engines.cost import (
    KernelShape,
    LayerShape,
    choose_diagonal,
    choose_kernel,
    choose_product,
    diagonal_costs,
    kernel_costs,
    product_costs,
)


def test_without_shared_weights_always_gram():
    layer = LayerShape(positions=1, inputs=3, outputs=2)
    assert choose_kernel(layer, KernelShape(100, 100, 10, 10, symmetric=True)) == "gram"
    assert choose_diagonal(layer) == "gram"


def test_many_positions_build_gradients_and_few_take_gram():
    wanted = KernelShape(16, 16, 1, 1, terms=10, symmetric=True)
    first_layer = LayerShape(positions=1024, inputs=27, outputs=32)
    last_layer = LayerShape(positions=4, inputs=1152, outputs=128)
    assert choose_kernel(first_layer, wanted) == "gradient"
    assert choose_kernel(last_layer, wanted) == "gram"
    assert choose_diagonal(first_layer) == "gradient"
    assert choose_diagonal(last_layer) == "gram"


def test_groups_have_only_gradients():
    layer = LayerShape(positions=1, inputs=9, outputs=1, groups=64)
    assert kernel_costs(layer, KernelShape(8, 8, 2, 2)).keys() == {"gradient"}
    assert diagonal_costs(layer).keys() == {"gradient"}
    assert product_costs(layer, 8, 8, 2).keys() == {"factors", "gradient"}
    assert choose_kernel(layer, KernelShape(8, 8, 2, 2)) == "gradient"


def test_kernel_costs_are_the_formulas():
    layer = LayerShape(positions=3, inputs=5, outputs=7)
    wanted = KernelShape(left=2, right=4, rows=6, columns=6)
    costs = kernel_costs(layer, wanted)
    build = 2 * 3 * 5 * 7 * (2 * 6 + 4 * 6)
    contract = 2 * (2 * 6) * (4 * 6) * 5 * 7
    assert costs["gradient"] >= build + contract
    gram = 2 * (2 * 3) * (4 * 3) * 5 + 2 * (2 * 3) * (4 * 3) * 6 * 7 + 2 * (2 * 6) * (4 * 6) * 3 * 7
    assert costs["gram"] >= gram
    symmetric = KernelShape(left=4, right=4, rows=6, columns=6, symmetric=True)
    assert (
        kernel_costs(layer, symmetric)["gradient"] < kernel_costs(layer, KernelShape(4, 4, 6, 6))["gradient"]
    )


def test_terms_are_summed_inside_the_products():
    """A trace over outputs costs the Gram route one entrywise product, not one for each output."""
    layer = LayerShape(positions=16, inputs=64, outputs=64)
    traced = kernel_costs(layer, KernelShape(8, 8, 1, 1, terms=10))["gram"]
    each = kernel_costs(layer, KernelShape(8, 8, 1, 1, kernels=10))["gram"]
    every = kernel_costs(layer, KernelShape(8, 8, 10, 10))["gram"]
    assert traced < each < every


@pytest.mark.parametrize(
    "layer, route",
    [
        (LayerShape(positions=1, inputs=256, outputs=256), "dual"),
        (LayerShape(positions=1024, inputs=288, outputs=64), "gradient"),
        (LayerShape(positions=8, inputs=64, outputs=64), "factors"),
    ],
)
def test_products_take_the_cheapest_way(layer, route):
    costs = product_costs(layer, 64, 64, 10)
    assert choose_product(layer, 64, 64, 10) == route
    assert costs[route] == min(costs.values())


def test_a_table_is_never_written_down():
    table = LayerShape(positions=8, inputs=50_000, outputs=64, one_hot=True)
    assert choose_product(table, 32, 32, 10) in ("factors", "dual")
