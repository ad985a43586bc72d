"""The LightningModules, which only sequence: passes over the model, primal step, dual step."""

from lit_unlearn.module.base import LitLanguageModel, Schedule
from lit_unlearn.module.evaluate import LitEvaluate
from lit_unlearn.module.finetune import LitFinetune
from lit_unlearn.module.measured import Measurement
from lit_unlearn.module.strategies import FSDP2Strategy
from lit_unlearn.module.unlearn import LitUnlearn

__all__ = ["FSDP2Strategy", "LitEvaluate", "LitFinetune", "LitLanguageModel", "LitUnlearn", "Measurement", "Schedule"]
