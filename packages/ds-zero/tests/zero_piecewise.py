"""An optimizer that needs whole parameters, in the way of LAMB (norms) and Muon (matrices), over batches of pieces.

m = 0.9 m + g;  matrices: d = m with every column shifted by its mean, vectors: d = m;  p -= lr |p| / |d| d. Every
operation is rounded by itself and sums are fp64, so that the result does not depend on how a parameter is cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ds_zero import PieceBatch


class Whole(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.seen: list[list[str]] = []

    def allocate(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum"] = torch.zeros_like(parameter)
            if group is not self.param_groups[0]:  # groups may differ in what they keep
                state["extra"] = torch.zeros_like(parameter)
        return state

    def begin_step(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.allocate(parameter, group)
        state["step"] += 1
        return state

    def step_pieces(self, batches: Iterable[PieceBatch]) -> None:
        self.seen.append([])
        for batch in batches:
            self.seen[-1] += [slot.name for slot in batch.slots]
            directions: dict[int, Tensor] = {}
            for piece in batch.pieces:
                new = piece.grad.float() * batch.grad_scale
                piece.state["momentum"].mul_(0.9).add_(new)
                directions[piece.slot] = piece.state["momentum"].clone()
                if "extra" in piece.state:
                    piece.state["extra"].add_(new.abs())
            matrices = [index for index, slot in enumerate(batch.slots) if len(slot.shape) > 1]
            if matrices:
                directions.update(batch.map_whole(matrices, directions, centred))
            squares = torch.zeros(len(batch.slots), 2, dtype=torch.float64)
            for piece in batch.pieces:
                squares[piece.slot, 0] += piece.param.double().square().sum()
                squares[piece.slot, 1] += directions[piece.slot].double().square().sum()
            squares = batch.sum(squares)
            for piece in batch.pieces:
                of_p, of_d = squares[piece.slot].sqrt().float().tolist()
                lr = batch.slots[piece.slot].group["lr"] * (of_p / of_d if of_p and of_d else 1.0)
                piece.param.sub_(directions[piece.slot] * lr)
                if piece.out is not None:
                    piece.out.copy_(piece.param)


def centred(slot: int, whole: Tensor) -> Tensor:
    return whole - whole.mean(0)


def plain_step(parameters: list[Tensor], momenta: list[Tensor], grads: list[Tensor], lr: float = 0.05) -> None:
    """The same on whole tensors, in place."""
    for p, m, g in zip(parameters, momenta, grads, strict=True):
        m.mul_(0.9).add_(g)
        d = m - m.mean(0) if m.dim() > 1 else m
        of_p, of_d = (float(x.double().square().sum().sqrt().float()) for x in (p, d))
        p.sub_(d * (lr * (of_p / of_d if of_p and of_d else 1.0)))
