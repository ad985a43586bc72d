"""The LightningModules, which only sequence: passes over the model, primal step, dual step."""

from lit_unlearn.training.evaluate import LitEvaluate
from lit_unlearn.training.evaluator import Measurement
from lit_unlearn.training.finetune import LitFinetune
from lit_unlearn.training.float32_weights import Float32Weights
from lit_unlearn.training.module import LitLanguageModel, Schedule
from lit_unlearn.training.strategies import FSDP2Strategy
from lit_unlearn.training.unlearn import LitUnlearn

__all__ = [
    "FSDP2Strategy",
    "Float32Weights",
    "LitEvaluate",
    "LitFinetune",
    "LitLanguageModel",
    "LitUnlearn",
    "Measurement",
    "Schedule",
]
