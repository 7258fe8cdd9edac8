"""Tests that a card is found by every name that users and jax give it, and by no name of another device."""

import itertools
import re

import pytest

from jaxpack.errors import InputError
from jaxpack.planning.cards import CARDS, card_named, card_of, cards_called, rates_of

UNKNOWN = rates_of("cpu")


@pytest.mark.parametrize(
    ("names", "card"),
    [
        (
            ("4090", "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "rtx-4090", "GEFORCE_4090"),
            "RTX 4090",
        ),
        (("4070 ti super", "RTX4070TiSuper", "NVIDIA GeForce RTX 4070 Ti SUPER 16 GB"), "RTX 4070 Ti Super"),
        (("4060ti", "RTX 4060 Ti", "4060 Ti 8GB", "4060ti-8gb"), "RTX 4060 Ti 8GB"),
        (("4060 Ti 16 GB", "rtx4060ti16gb", "RTX 4060 Ti 16 GiB"), "RTX 4060 Ti 16GB"),
        (("RTX 3080", "3080 10GB"), "RTX 3080 10GB"),
        (("a100", "A100-40GB", "A100 SXM", "A100 SXM4 40GB"), "A100 40GB"),
        (("a100 80gb", "A100-80GB", "A100 80GB SXM"), "A100 80GB"),
        (("A100 PCIe 80GB", "A100 80GB PCIe"), "A100 80GB PCIe"),
        (("H100", "h100 sxm", "H100-SXM5-80GB"), "H100"),
        (("H100 PCIe",), "H100 PCIe"),
        (("A6000", "RTX A6000"), "RTX A6000"),
        (("6000 Ada", "RTX 6000 Ada"), "RTX 6000 Ada"),
        (("RTX PRO 6000", "PRO 6000 Blackwell"), "RTX PRO 6000 Blackwell"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_user_may_write_a_name_in_many_ways(names, card):
    assert {card_named(name).name for name in names} == {card}


@pytest.mark.parametrize(
    ("kind", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 3080", "RTX 3080 10GB"),
        ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    ],
)
def test_what_jax_calls_a_card_is_found(kind, card):
    found = card_of(kind)
    assert found is not None
    assert found.name == card
    assert rates_of(kind) == card_named(card).rates != UNKNOWN


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "NVIDIA",
        "NVIDIA X1",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H20",
        "NVIDIA L40",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "Quadro RTX 6000",
        "Tesla T4",
        "Tesla V100-SXM2-32GB",
        "AMD Radeon RX 7900 XTX",
    ],
)
def test_other_devices_are_unknown_and_slow(kind):
    assert card_of(kind) is None
    assert rates_of(kind) == UNKNOWN
    assert all(a <= b for a, b in zip(UNKNOWN, card_named("H100").rates, strict=True))


def test_every_card_is_found_by_its_own_name_alone():
    for card in CARDS:
        assert cards_called(card.name)[0] == card
        assert card_named(f"NVIDIA {card.name}") == card_named(card.name.lower().replace(" ", "-")) == card


def test_of_several_cards_with_one_name_that_with_the_least_memory_is_taken():
    for card in CARDS:
        found = cards_called(re.sub(r" \d+GB", "", card.name))
        assert card in found
        for smaller, larger in itertools.pairwise(found):
            assert smaller.gigabytes < larger.gigabytes
            assert all(a <= b for a, b in zip(smaller.rates, larger.rates, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RTX 6000", "got 'RTX 6000'. Did you mean RTX A6000 or RTX 6000 Ada or RTX PRO 6000 Blackwell?"),
        ("4090 Laptop GPU", "got '4090 Laptop GPU'. Did you mean RTX 4090? For another card, name the known one"),
        ("RTX 4091", "Did you mean RTX 40"),
        ("A-100X", "Did you mean A100"),
        ("Radeon", "got 'Radeon'. Known are H200, H100, "),
        ("", "got ''. Known are H200, H100, "),
        ("RTX", "got 'RTX'. Known are H200, H100, "),
        ("RTX 3080 16GB", "got 'RTX 3080 16GB': RTX 3080 has 10 GB or 12 GB."),
        ("RTX 4090 48GB", "got 'RTX 4090 48GB': RTX 4090 has 24 GB."),
        ("Tesla T4", "computes in bfloat16 (Ampere or newer: A10, RTX 30 and later), got 'Tesla T4'."),
        ("V100 32GB", "computes in bfloat16"),
        ("RTX 2080 Ti", "computes in bfloat16"),
        ("Quadro RTX 6000", "computes in bfloat16"),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_what_to_do(name, message):
    with pytest.raises(InputError) as refused:
        card_named(name)
    assert str(refused.value).startswith("`gpu` must be ")
    assert message in str(refused.value)
    assert "`memory_limit`" in str(refused.value) or "choose a newer one" in str(refused.value)


def test_cuda_reports_no_less_memory_than_is_expected():
    """Compares with the capacity that torch names where it runs out of memory, in GiB."""
    reported = {
        "RTX 3080 10GB": 9.77,
        "RTX 3060": 11.75,
        "RTX 5080": 15.46,
        "RTX 4090": 23.5,
        "RTX 5090": 31.36,
        "A100 40GB": 39.39,
        "H100": 79.1,
        "RTX PRO 6000 Blackwell": 94.97,
        "H200": 139.7,
        "L4": 21.95,
        "L40S": 44.39,
        "RTX 6000 Ada": 44.43,
    }
    for name, gib in reported.items():
        assert 0.97 * gib < card_named(name).total_bytes / 2**30 <= gib


def test_a_card_with_fewer_or_slower_cores_is_not_predicted_to_be_faster():
    """An H100 with less power has the cores of an H100, and its published rates are no higher than measured ones."""
    for slower in ("H100 PCIe", "H100 NVL", "A100 80GB", "RTX 5090"):
        card = card_named(slower)
        assert not card.measured
        assert card.rates.matmul < card_named("H100").rates.matmul
        assert card.rates.attention < card_named("H100").rates.attention
    assert {card.name for card in CARDS if card.measured} == {"H200", "H100"}
