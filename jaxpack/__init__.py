"""Packed, padding-free fine-tuning of language models in JAX."""

from jaxpack.config import GenerateConfig as GenerateConfig
from jaxpack.config import Llama3RopeScaling as Llama3RopeScaling
from jaxpack.config import LoraConfig as LoraConfig
from jaxpack.config import ModelConfig as ModelConfig
from jaxpack.config import RopeConfig as RopeConfig
from jaxpack.config import TrainConfig as TrainConfig
from jaxpack.data.batching import Batches as Batches
from jaxpack.data.packing import PackedBatch as PackedBatch
from jaxpack.data.packing import pack_rows as pack_rows
from jaxpack.data.preview import ShownRow as ShownRow
from jaxpack.data.preview import show_row as show_row
from jaxpack.data.reading import Documents as Documents
from jaxpack.data.reading import load_documents as load_documents
from jaxpack.errors import InputError as InputError
from jaxpack.generation.text import generate as generate
from jaxpack.generation.text import generate_text as generate_text
from jaxpack.model.lora import add_lora as add_lora
from jaxpack.model.transformer import Transformer as Transformer
from jaxpack.planning.inspect import Inspection as Inspection
from jaxpack.planning.inspect import Promise as Promise
from jaxpack.planning.inspect import inspect as inspect
from jaxpack.train.report import write_report as write_report
from jaxpack.train.trainer import Trainer as Trainer
from jaxpack.train.trainer import TrainResult as TrainResult
