"""Packed, padding-free fine-tuning of language models in JAX."""

from jaxpack.batching import Batches as Batches
from jaxpack.config import GenerateConfig as GenerateConfig
from jaxpack.config import Llama3RopeScaling as Llama3RopeScaling
from jaxpack.config import LoraConfig as LoraConfig
from jaxpack.config import ModelConfig as ModelConfig
from jaxpack.config import RopeConfig as RopeConfig
from jaxpack.config import TrainConfig as TrainConfig
from jaxpack.data import Documents as Documents
from jaxpack.data import load_documents as load_documents
from jaxpack.diagnostics import Inspection as Inspection
from jaxpack.diagnostics import Promise as Promise
from jaxpack.diagnostics import inspect as inspect
from jaxpack.errors import InputError as InputError
from jaxpack.generation import generate as generate
from jaxpack.generation import generate_text as generate_text
from jaxpack.lora import add_lora as add_lora
from jaxpack.packing import PackedBatch as PackedBatch
from jaxpack.packing import pack_rows as pack_rows
from jaxpack.run_report import write_report as write_report
from jaxpack.shown_rows import ShownRow as ShownRow
from jaxpack.shown_rows import show_row as show_row
from jaxpack.trainer import Trainer as Trainer
from jaxpack.trainer import TrainResult as TrainResult
from jaxpack.transformer import Transformer as Transformer
