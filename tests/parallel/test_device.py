"""Tests which device a run uses, how fast the host reaches it, and how much memory it pins there."""

from types import SimpleNamespace

import jax
import pytest

from jaxpack.parallel import device as device_module
from jaxpack.parallel.device import current_device, link_bytes_per_second, pinned_limit_bytes


@pytest.mark.parametrize(("setting", "expected"), [(None, 64), ("", 64), ("200", 200), ("much", 64)])
def test_so_much_is_pinned_as_xla_is_told(setting, expected, monkeypatch):
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    if setting is not None:
        monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", setting)
    assert pinned_limit_bytes() == expected * 2**30


def test_the_link_of_a_card_follows_from_its_age(monkeypatch):
    for capability, gigabytes in (("8.9", 25), ("9.0", 50), ("12.0", 50)):
        card = SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(device_module, "current_device", lambda card=card: card)
        assert link_bytes_per_second() == gigabytes * 1e9


def test_the_device_is_that_of_new_arrays(monkeypatch):
    assert current_device() == jax.local_devices()[0]
    with jax.default_device("cpu"):
        assert current_device() == jax.local_devices(backend="cpu")[0]
    last = jax.local_devices()[-1]
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: pytest.fail("was asked for"))
    with jax.default_device(last):
        assert current_device() == last
