"""Hugging Face's Trainer with PCGrad: one method is overridden, and everything else of the Trainer stays.

    torchrun --standalone --nproc_per_node 2 examples/trainer.py

The model gives each task's loss by name, here the two of `accelerate_two_heads.py`; any that does so will do. This is a
recipe and no class of the package, because what a Trainer does inside changes from release to release.
"""

from typing import Any

import torch
from accelerate_two_heads import TwoHeads, reviews
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mtl_dist import Surgery


class SurgeryTrainer(Trainer):
    """A Trainer whose model gives each task's loss."""

    surgery: Surgery | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the Trainer clips and steps after the last of a step."""
        if self.surgery is None:  # only now the model is wrapped
            self.surgery = Surgery(model, "pcgrad", shared="bert", accelerator=self.accelerator)
            self.surgery.number = self.state.global_step  # not 0 after resume_from_checkpoint
        model.train()
        with self.compute_loss_context_manager():
            losses = model(**self._prepare_inputs(inputs))
        # The Trainer's accelerator does not know of the accumulation.
        losses = {task: loss / self.current_gradient_accumulation_steps for task, loss in losses.items()}
        self.surgery.backward(losses)
        return sum(losses.values()).detach()


def trainer(**changes: Any) -> SurgeryTrainer:
    """On four batches of eight reviews a step, where there are two processes."""
    arguments = TrainingArguments(
        **{
            "output_dir": "runs/trainer",
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 1,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "adam_epsilon": 1e-4,
            "max_grad_norm": 3.0,
            "save_strategy": "no",
            "logging_steps": 10,
            "disable_tqdm": True,
            "report_to": [],
            "remove_unused_columns": False,
            # Else, on a machine without GPUs, each process trains for itself.
            "use_cpu": not torch.cuda.is_available(),
        }
        | changes
    )
    return SurgeryTrainer(model=TwoHeads(), args=arguments, train_dataset=reviews())


if __name__ == "__main__":
    training = trainer()
    training.train()
    conflict = training.surgery.conflict
    if training.is_world_process_zero():
        print(f"{training.surgery.number} steps; the last one's cosine: {conflict.cosine['stars.topic']:.2f}")
    training.accelerator.end_training()  # or gloo, which serves CPUs, may abort at the exit
