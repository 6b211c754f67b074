"""Low-rank adapters on every linear layer except the output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ENCODER = "encoder_adapter"
DECODER = "decoder_adapter"
QUERY = "query_reasoner_adapter"


class LoraLinear(nn.Module):
    """A frozen linear layer plus the currently active adapter's update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.active: str | None = None

    def add(self, adapter: str, rank: int) -> None:
        """New adapter: A uniform, B zero, alpha = 2 * rank."""
        self.lora_A[adapter] = nn.Linear(self.base_layer.in_features, rank, bias=False)
        self.lora_B[adapter] = nn.Linear(rank, self.base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B[adapter].weight)
        self.scale[adapter] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.active is not None:
            y = y + self.lora_B[self.active](self.lora_A[self.active](x)) * self.scale[self.active]
        return y


def wrap_linear_layers(model: nn.Module) -> list[LoraLinear]:
    """Replace the linear layers of ``model`` in place; the head stays plain."""
    wrapped = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                layer = LoraLinear(child)
                setattr(parent, name, layer)
                wrapped.append(layer)
    return wrapped


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter under the names used in ``adapters.pth``."""
    mark = f".{adapter}."
    return {
        name.replace(mark, "."): parameter
        for name, parameter in model.named_parameters()
        if mark in name and "lora_" in name
    }


@torch.no_grad()
def load_adapter(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Fill one adapter; copies of embedding and head in the file are ignored."""
    own = adapter_parameters(model, adapter)
    given = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    assert own.keys() == given.keys(), own.keys() ^ given.keys()
    for name, tensor in given.items():
        own[name].copy_(tensor)
