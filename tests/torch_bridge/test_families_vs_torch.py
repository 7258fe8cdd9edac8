"""Every family computes what transformers and PEFT compute with the same weights: see `families.measure`."""

import pytest

from tests.torch_bridge import families, hf

# peft calls what transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", params=hf.FAMILIES)
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> families.Figures:
    return families.measure(f"{request.param}-untied", tmp_path_factory.mktemp("folder"))


# The tolerances, and why, are those of `test_parity_vs_torch.py`.


def test_logits_equal_transformers(figures: families.Figures):
    assert figures.logits <= 1e-4


def test_loss_with_lora_equals_peft(figures: families.Figures):
    assert figures.loss <= 1e-5


def test_gradients_of_adapters_and_weights_equal_peft(figures: families.Figures):
    assert figures.gradients <= 1e-4


def test_packed_documents_have_the_logits_that_they_have_alone(figures: families.Figures):
    assert figures.packed <= 1e-5


def test_an_adapter_has_the_tensors_that_peft_writes(figures: families.Figures):
    assert figures.adapter_out
