"""Training many adapters at once: one forward and backward of the base for the rows of all of them.

    runs = {name: AdapterTraining(train_dataset=rows, learning_rate=lr) for name, lr in ...}
    JointTrainer(model, TrainingArguments("out", ...), runs).train()

transformers is imported when JointTrainer is first asked for.
"""

from typing import TYPE_CHECKING

from fastpeft.lazy import lazy_names

if TYPE_CHECKING:
    from fastpeft.joint.settings import AdapterTraining as AdapterTraining
    from fastpeft.joint.trainer import JointTrainer as JointTrainer

__getattr__, __all__ = lazy_names(
    __name__,
    {"fastpeft.joint.settings": ["AdapterTraining"], "fastpeft.joint.trainer": ["JointTrainer"]},
)
