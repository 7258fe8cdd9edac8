"""Holds the memory and the rates of NVIDIA cards by name, and finds a card by the name that a user or jax gives it."""

import dataclasses
import difflib
import re
from typing import NamedTuple

from jaxpack.constants import MEMORY_FRACTION
from jaxpack.errors import InputError
from jaxpack.model.cost import Cost


class DeviceRates(NamedTuple):
    """Holds the work per second that a device sustains within a step, and the seconds that each kernel adds.

    Sustained rates are lower than the best rates of a benchmark of one kernel.
    """

    matmul: float  # bfloat16 floating-point operations per second
    attention: float  # floating-point operations per second within attention kernels
    memory: float  # bytes per second
    link: float  # bytes per second from the device to the host, and as many from the host to the device
    kernel: float  # seconds that each kernel takes on the device in addition to its work
    start: float  # seconds that the host takes to start each kernel, if it starts kernels one by one

    def seconds(self, cost: Cost) -> float:
        """Returns the seconds of a micro-batch's work (`Cost.for_tokens`), with kernels running one after another."""
        moved = cost.bytes + cost.weight_bytes
        return cost.matmul / self.matmul + cost.attention / self.attention + moved / self.memory


_SUSTAINED = 720 / 989  # the share of the published matmul rate that steps sustain
JAX_MEMORY_FRACTION = 0.75  # the share of a card that jax takes by itself
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Holds what is known of a card without having it.

    Attributes:
      name: NVIDIA's name without "NVIDIA" and "GeForce", and with the memory if there are variants.
      gigabytes: the published memory. NVIDIA's gigabytes are 2^30 bytes.
      rates: the rates that a step sustains.
      measured: whether the rates were measured in steps; if not, they are shares of published figures.
      ecc: whether error correction takes a sixteenth of the memory, as in data-centre cards with GDDR memory.
    """

    name: str
    gigabytes: int
    rates: DeviceRates
    measured: bool = False
    ecc: bool = False

    @property
    def peak_flops(self) -> float:
        """Returns the published dense bfloat16 operations per second, with float32 accumulation."""
        return self.rates.matmul / _SUSTAINED

    @property
    def total_bytes(self) -> float:
        """Returns the memory that CUDA reports, or slightly less.

        The driver keeps about 1 % and 0.4 GiB for itself: CUDA reports 15.46 GiB of an RTX 5080's 16 and an RTX 4090's
        23.6 of 24, 31.4 of 32, 39.4 of 40, 79.1 of 80, 94.97 of 96 and 139.8 of 141.
        """
        return (self.gigabytes * (15 / 16 if self.ecc else 1) * 0.99 - 0.4) * _GIB

    @property
    def memory_bytes(self) -> float:
        """Returns the memory that a run can have, with room for CUDA itself and, on most desktops, for a screen."""
        return MEMORY_FRACTION * self.total_bytes


def _published(name: str, gigabytes: int, tflops: float, bandwidth: float, link: float, ecc: bool = False) -> Card:
    """Returns a card whose rates are shares of published figures.

    The shares are those that steps sustained on the H200: 720 of 989 TFLOP/s in matmuls, 500 of 989 in attention, 3.0
    of 4.8 TB/s of memory, and 50 of 63 GB/s of PCIe 5.0 with 16 lanes. On the H100 they were the same, and higher only
    for memory: 2.4 of 3.35 TB/s.

    Args:
      tflops: dense bfloat16 operations with float32 accumulation, in 10^12 per second.
      bandwidth: of the memory, in 10^9 bytes per second.
      link: of PCIe in one direction, in 10^9 bytes per second.
    """
    rates = DeviceRates(
        matmul=tflops * 1e12 * _SUSTAINED,
        attention=tflops * 1e12 * 500 / 989,
        memory=bandwidth * 1e9 * 3.0 / 4.8,
        link=link * 1e9 * 50 / 63,
        kernel=2e-6,
        start=7e-6,
    )
    return Card(name=name, gigabytes=gigabytes, rates=rates, ecc=ecc)


# PCIe by generation and lanes, in one direction. A slot with fewer lanes makes offloading slower.
_4X8, _4X16, _5X8, _5X16 = 15.75, 31.5, 31.5, 63.0

# The H200 and the H100 were measured, from kernels of steps (2026-11-26 and 2026-11-27). On the H100 (SXM), only the
# first three figures were measured; the last three are taken from the H200.
#
# The others are published: in NVIDIA's architecture whitepapers (GA102, Ada, RTX Blackwell, A100, H100) and data sheets
# (A10, A10G, A40, L4, L40S, B200, RTX A and RTX PRO). All figures are dense: where a sheet only names rates "with
# sparsity", half of them. GeForce cards add up in float32 at half the rate of their tensor cores, so 2 x their float32
# rate; the RTX A, Ada and PRO cards at the full rate, so 4 x. Where the whitepaper does not list a card, its rate
# follows from the published cores and boost clock in this way.
CARDS = (
    Card(
        name="H200",
        gigabytes=141,
        rates=DeviceRates(720e12, 500e12, 3.0e12, 50e9, 2e-6, 7e-6),
        measured=True,
    ),
    Card(
        name="H100",
        gigabytes=80,
        rates=DeviceRates(720e12, 500e12, 2.4e12, 50e9, 2e-6, 7e-6),
        measured=True,
    ),
    _published("H100 NVL", 94, 835, 3938, _5X16),
    _published("H100 PCIe", 80, 756, 2000, _5X16),
    _published("H200 NVL", 141, 835, 4800, _5X16),
    _published("B200", 180, 2250, 8000, _5X16),
    _published("A100 40GB", 40, 312, 1555, _4X16),
    _published("A100 40GB PCIe", 40, 312, 1555, _4X16),
    _published("A100 80GB", 80, 312, 2039, _4X16),
    _published("A100 80GB PCIe", 80, 312, 1935, _4X16),
    _published("A10", 24, 125, 600, _4X16, ecc=True),
    _published("A10G", 24, 70, 600, _4X16, ecc=True),
    _published("A40", 48, 149.7, 696, _4X16, ecc=True),
    _published("L4", 24, 121, 300, _4X16, ecc=True),
    _published("L40S", 48, 362, 864, _4X16, ecc=True),
    _published("RTX A4000", 16, 76.7, 448, _4X16),
    _published("RTX A5000", 24, 111.1, 768, _4X16),
    _published("RTX A6000", 48, 154.8, 768, _4X16),
    _published("RTX 6000 Ada", 48, 364.2, 960, _4X16, ecc=True),
    _published("RTX PRO 6000 Blackwell", 96, 503.8, 1792, _5X16),
    _published("RTX 3060", 12, 25.5, 360, _4X16),
    _published("RTX 3080 10GB", 10, 59.5, 760, _4X16),
    _published("RTX 3080 12GB", 12, 61.3, 912, _4X16),
    _published("RTX 3080 Ti", 12, 68.2, 912, _4X16),
    _published("RTX 3090", 24, 71, 936, _4X16),
    _published("RTX 3090 Ti", 24, 80, 1008, _4X16),
    _published("RTX 4060 Ti 8GB", 8, 44.1, 288, _4X8),
    _published("RTX 4060 Ti 16GB", 16, 44.1, 288, _4X8),
    _published("RTX 4070", 12, 58.3, 504, _4X16),
    _published("RTX 4070 Super", 12, 71, 504, _4X16),
    _published("RTX 4070 Ti", 12, 80.2, 504, _4X16),
    _published("RTX 4070 Ti Super", 16, 88.2, 672, _4X16),
    _published("RTX 4080", 16, 97.5, 717, _4X16),
    _published("RTX 4080 Super", 16, 104.4, 736, _4X16),
    _published("RTX 4090", 24, 165.2, 1008, _4X16),
    _published("RTX 5060 Ti 8GB", 8, 47.4, 448, _5X8),
    _published("RTX 5060 Ti 16GB", 16, 47.4, 448, _5X8),
    _published("RTX 5070", 12, 61.7, 672, _5X16),
    _published("RTX 5070 Ti", 16, 87.9, 896, _5X16),
    _published("RTX 5080", 16, 112.6, 960, _5X16),
    _published("RTX 5090", 32, 209.5, 1792, _5X16),
)
# Also for a CPU, which starts no kernels.
_UNKNOWN = DeviceRates(100e12, 50e12, 0.6e12, 10e9, 0, 0)

_LEFT_OUT = re.compile(r"nvidia|geforce|tesla|rtx|[^a-z0-9]")  # says nothing about which card it is
_MEMORY = re.compile(r"(\d+)\s*gi?b\b")
# Other names of the same cards. jax says "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB",
# "NVIDIA RTX 6000 Ada Generation" and "NVIDIA RTX PRO 6000 Blackwell Workstation Edition".
_ALIASES = {
    "h100hbm3": "h100",
    "h100sxm": "h100",
    "h100sxm5": "h100",
    "h200sxm": "h200",
    "h200sxm5": "h200",
    "a100sxm": "a100",
    "a100sxm4": "a100",
    "6000adageneration": "6000ada",
    "pro6000": "pro6000blackwell",
    "pro6000blackwellworkstationedition": "pro6000blackwell",
}
_BEFORE_AMPERE = re.compile(r"(t4|v100|p100|p40|gtx|titan|20[678]0|quadro).*")  # cards without bfloat16


def _key(name: str) -> tuple[str, int | None]:
    """Returns a card's name without what it may be written with or without, and the memory that it names, if any."""
    name = name.casefold()
    named = _MEMORY.search(name)
    key = _LEFT_OUT.sub("", _MEMORY.sub("", name))
    return _ALIASES.get(key, key), int(named[1]) if named else None


def _line(card: Card) -> str:
    """Returns the name that the variants of a card share."""
    return card.name.replace(f" {card.gigabytes}GB", "")


def cards_called(name: str) -> list[Card]:
    """Returns the cards that a name may mean, those with the least memory first; none for a name that is not known.

    Case, spaces, hyphens, "NVIDIA", "GeForce" and "RTX" make no difference. A slice of a card (MIG) and the version of
    a card in a laptop are other devices, and are not known.

    Example:
      >>> [card.name for card in cards_called("nvidia geforce rtx-3080")]
      ['RTX 3080 10GB', 'RTX 3080 12GB']
    """
    key, gigabytes = _key(name)
    found = [card for card in CARDS if _key(card.name)[0] == key and gigabytes in (None, card.gigabytes)]
    return sorted(found, key=lambda card: card.gigabytes)


def card_of(device_kind: str) -> Card | None:
    """Returns the card that jax calls `device_kind`, or None for any other device.

    Variants of one name only differ in memory, which jax reports, and sometimes in rates: the slower one is taken.
    """
    return next(iter(cards_called(device_kind)), None)


def card_named(name: str) -> Card:
    """Returns the card that a user means, the one with the least memory if there are several of this name.

    Raises:
      InputError: the name is no text, or the card is not known, has no variant with this memory, or cannot compute in
        bfloat16.
    """
    if not isinstance(name, str):
        raise InputError(f'`gpu` must be the name of a card, such as "RTX 4090", got {name!r}.')
    if found := cards_called(name):
        return found[0]
    key, gigabytes = _key(name)
    if _BEFORE_AMPERE.fullmatch(key):
        raise InputError(
            f"`gpu` must be a card that computes in bfloat16 (Ampere or newer: A10, RTX 30 and later), got {name!r}."
            " jaxpack's kernels and weights are bfloat16 on a GPU, so it does not run on this card: choose a newer one."
        )
    if gigabytes is not None and (others := cards_called(_MEMORY.sub("", name.casefold()))):
        sold = " or ".join(f"{card.gigabytes} GB" for card in others)
        raise InputError(
            f"`gpu` must be a card with the memory that it was sold with, got {name!r}: {_line(others[0])} has {sold}."
            " For another size, leave it out of the name and give `memory_limit`."
        )
    keys = {_key(card.name)[0]: _line(card) for card in CARDS}
    near = [name for known, name in keys.items() if key and (key in known or known in key)]
    near = near or [keys[known] for known in difflib.get_close_matches(key, keys, n=4)]
    what = f"Did you mean {' or '.join(near[:6])}?" if near else f"Known are {', '.join(keys.values())}."
    raise InputError(
        f"`gpu` must be the name of a known card, got {name!r}. {what} For another card, name the known one that is"
        " most like it, and give the memory that a run may use with `memory_limit`."
    )


def rates_of(device_kind: str) -> DeviceRates:
    """Returns the rates of the device that jax calls `device_kind`, or low ones for an unknown device."""
    card = card_of(device_kind)
    return _UNKNOWN if card is None else card.rates
