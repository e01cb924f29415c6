"""The fixed product: it sees a machine that slows down, and leaves no trace in the random state."""

import time

import torch

from suites import yardstick


def test_a_slower_machine_has_longer_products(monkeypatch):
    product = torch.mm

    def delayed(*operands, **options):
        time.sleep(0.1)
        return product(*operands, **options)

    before = yardstick.product_seconds("cpu")
    monkeypatch.setattr(torch, "mm", delayed)
    assert yardstick.product_seconds("cpu") > max(0.1, before)


def test_random_numbers_stay_the_same():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    yardstick.product_seconds("cpu")
    assert torch.equal(torch.rand(3), expected)
