"""A user's training loop on accelerate, which says nothing of DeepSpeed; test_launchers.py starts it in several ways.

Arguments: the model's folder and where to write. Trains on rows of 12 tokens, two a micro-batch, two micro-batches a
step; saves the model as transformers does. Without a launcher it is the plain run of one process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import AutoModelForCausalLM

FOLDER, OUT = Path(sys.argv[1]), Path(sys.argv[2])
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
# A CPU needs its backend named; the one process has none.
handlers = [InitProcessGroupKwargs(backend="gloo")] if RANKS > 1 else []
accelerator = Accelerator(gradient_accumulation_steps=2, kwargs_handlers=handlers, cpu=RANKS == 1)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
resident = sum(parameter.numel() for parameter in model.parameters())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rows = torch.tensor([[(i + j) % 64 for j in range(12)] for i in range(32)])
loader = torch.utils.data.DataLoader(rows, batch_size=4 // RANKS)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
state = accelerator.get_state_dict(model)
whole = accelerator.unwrap_model(model)
whole.save_pretrained(
    OUT / "final", is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
)
if accelerator.is_main_process:
    found = {"losses": losses, "resident": resident, "engine": type(model).__name__, "ranks": RANKS}
    (OUT / "found.json").write_text(json.dumps(found))
accelerator.end_training()
