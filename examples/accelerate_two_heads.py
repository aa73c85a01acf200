"""A Hugging Face BERT with two heads, trained with PCGrad in a loop of Accelerate: on one process, DDP, FSDP2 or ZeRO.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml examples/accelerate_two_heads.py
    accelerate launch --config_file accelerate_configs/ddp_bf16.yaml --num_processes 2 examples/accelerate_two_heads.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \
        --fsdp_transformer_layer_cls_to_wrap BertLayer examples/accelerate_two_heads.py
    accelerate launch --num_processes 2 --use_deepspeed --zero_stage 2 --gradient_accumulation_steps 2 \
        --gradient_clipping 3.0 examples/accelerate_two_heads.py

Every review has two labels: one forward pass, two losses. With a FOLDER behind it, the command saves there every ten
steps, and goes on with what it finds.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from mtl_dist import Surgery, split_groups

WORDS = 90


class TwoHeads(nn.Module):
    """What a review is about, and how many stars it gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=WORDS, **shape, **dropout)
        self.bert = BertModel(config, add_pooling_layer=False)  # or BertModel.from_pretrained(NAME, the same)
        self.topic = nn.Linear(32, 3)
        self.stars = nn.Linear(32, 1)

    def forward(self, input_ids: Tensor, topic: Tensor, stars: Tensor) -> dict[str, Tensor]:
        """Each task's loss."""
        mean_NH = self.bert(input_ids).last_hidden_state.mean(1)
        return {
            "topic": F.cross_entropy(self.topic(mean_NH), topic),
            "stars": F.mse_loss(self.stars(mean_NH)[:, 0], stars),
        }


def reviews(rows: int = 960) -> list[dict[str, Tensor]]:
    """Words at random, half of them from the topic's third of the vocabulary; every third word is a good one."""
    random = torch.Generator().manual_seed(1)
    topic_N = torch.randint(3, (rows,), generator=random)
    words_NL = torch.randint(WORDS, (rows, 12), generator=random)
    words_NL[:, :6] = words_NL[:, :6] // 3 + WORDS // 3 * topic_N[:, None]
    stars_N = 4 * (words_NL % 3 == 0).float().mean(1)
    return [{"input_ids": w, "topic": t, "stars": s} for w, t, s in zip(words_NL, topic_N, stars_N, strict=True)]


def train(accelerator: Accelerator, folder: Path | None = None, combiner: str = "pcgrad") -> tuple[nn.Module, Surgery]:
    """An epoch; the model as the engine has wrapped it."""
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-4)
    # ZeRO moves all parameters of a group or none, and a step may go without a task. Other engines do not mind.
    split_groups(optimizer, model, "topic", "stars")
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(reviews(), batch_size=8))
    surgery = Surgery(model, combiner, shared="bert", accelerator=accelerator)
    accelerator.register_for_checkpointing(surgery)
    if folder is not None and folder.exists():
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, surgery.number * accelerator.gradient_accumulation_steps)

    for batch in loader:
        with accelerator.accumulate(model):
            losses = model(**batch)
            surgery.backward(losses)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and surgery.number % 10 == 0:
            said = ", ".join(f"{task} {loss.item():.2f}" for task, loss in losses.items())
            accelerator.print(f"step {surgery.number}: {said}, cosine {surgery.conflict.cosine['stars.topic']:.2f}")
            if folder is not None:
                accelerator.save_state(str(folder))
    return model, surgery


if __name__ == "__main__":
    # Without cpu=True, Accelerate lets the processes on a CPU train each for itself.
    device = {"cpu": not torch.cuda.is_available()}
    accelerator = Accelerator(**device, gradient_accumulation_steps=2)
    train(accelerator, Path(sys.argv[1]) if sys.argv[1:] else None)
    accelerator.end_training()
