"""The LightningModules, which only sequence: passes over the model, primal step, dual step."""

from lit_unlearn.module.base import LitLanguageModel, Schedule
from lit_unlearn.module.finetune import LitFinetune
from lit_unlearn.module.unlearn import LitUnlearn

__all__ = ["LitFinetune", "LitLanguageModel", "LitUnlearn", "Schedule"]
