"""A Soft MoE layer written from its formulas in the plainest way, one input, expert and slot at a time.

It shares no code with the package. Axes: b inputs, m tokens, d model width, n experts, p slots per
expert, h hidden width of an expert.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

WITH_SURROGATE = ("mean", "lstsq", "affine", "low-rank", "low-rank-lstsq")


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def reference_layer(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    router_norm: str,
    dispatch_input: str,
    kept: Sequence[Sequence[int]] | None = None,
    compensation: str = "none",
    surrogate: Tensor | None = None,
    static_correction: bool = False,
    affine: Mapping[str, Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] = gelu,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Y (b,m,d) in float64 for tokens x (b,m,d).

    Args:
        tensors: of the dense layer, by the names of its state dict.
        kept: the experts that run, for each input; None: all of them.
        compensation: `none` dropped experts give nothing, `renorm` the combine softmax is over the
            kept ones alone, with those in WITH_SURROGATE dropped slots give their surrogate.
        surrogate: (n,p,d), by the experts' index in the dense layer.
        static_correction: the surrogate of a kept slot is added to its output.
        affine: `affine_token`, `affine_mean` (d,d) and `affine_bias` (d): a linear map of the input, of the
            mean of its tokens, and a constant, that are added to the output.
        activation: of the experts.
        low_rank: A (n,d,r) and B (n,r,d) by the experts' index in the dense layer: for its own input s a dropped
            slot gives s·A·B beside its surrogate.
    """
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    n, p = tensors["phi"].shape[1:]
    outputs = []
    width = tensors["fc2_weight"].shape[1]
    for i, one in enumerate(x.double()):
        running = list(range(n)) if kept is None else list(kept[i])
        logits, tokens = reference_router(one, tensors, router_norm, dispatch_input)
        combine = reference_combine(logits, running if compensation == "renorm" else range(n))
        y = one.new_zeros(len(one), width)
        for j in range(n):
            for q in range(p):
                if j in running:
                    slot = reference_slot_output(logits[:, j, q], tokens, tensors, j, activation)
                    if static_correction and surrogate is not None:
                        slot = slot + surrogate[j, q].double()
                elif compensation in WITH_SURROGATE and surrogate is not None:
                    slot = surrogate[j, q].double()
                    if low_rank is not None:
                        into, out_of = (part[j].double() for part in low_rank)
                        slot = slot + reference_slot_input(logits[:, j, q], tokens) @ into @ out_of
                else:
                    continue
                y = y + combine[:, j, q, None] * slot[None, :]
        if affine:
            token, mean, bias = (affine[f"affine_{part}"].double() for part in ("token", "mean", "bias"))
            for t in range(len(one)):
                y[t] += one[t] @ token + sum(one) / len(one) @ mean + bias
        outputs.append(y)
    return torch.stack(outputs)


def reference_router(
    one: Tensor, tensors: Mapping[str, Tensor], router_norm: str, dispatch_input: str
) -> tuple[Tensor, Tensor]:
    """Logits L (m,n,p) of one input (m,d), and the tokens (m,d) that its slots average."""
    phi = tensors["phi"]
    n, p = phi.shape[1:]
    normalized = _normalize(one, router_norm, tensors.get("input_gain"))
    logits = one.new_zeros(len(one), n, p)
    for j in range(n):
        for q in range(p):
            column = _normalize(phi[:, j, q], router_norm, tensors.get("phi_gain"))
            if router_norm == "l2":
                column = column * tensors["scale"]
            logits[:, j, q] = normalized @ column
    return logits, one if dispatch_input == "raw" else normalized


def _normalize(vectors: Tensor, router_norm: str, gain: Tensor | None) -> Tensor:
    """Vectors (...,d) as the router takes them."""
    if router_norm == "l2":
        return vectors / vectors.square().sum(-1, keepdim=True).sqrt()
    if router_norm == "layer":
        centred = vectors - vectors.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    if router_norm == "rms":
        return vectors / vectors.square().mean(-1, keepdim=True).sqrt() * gain
    return vectors


def reference_combine(logits: Tensor, experts: Sequence[int]) -> Tensor:
    """C (m,n,p): for each token a softmax over all slots of these experts, zero for the others."""
    powers = (logits - logits.amax((1, 2), keepdim=True)).exp()
    total = sum(powers[:, j, q] for j in experts for q in range(logits.shape[2]))
    combine = torch.zeros_like(logits)
    for j in experts:
        combine[:, j] = powers[:, j] / total[:, None]
    return combine


def reference_hidden(
    slot_logits: Tensor,
    tokens: Tensor,
    tensors: Mapping[str, Tensor],
    j: int,
    activation: Callable[[Tensor], Tensor] = gelu,
) -> Tensor:
    """What the last linear of expert j takes (h), for the mean of the tokens weighted by the softmax of the logits."""
    hidden = reference_slot_input(slot_logits, tokens)
    if "fc1_weight" not in tensors:
        return hidden
    hidden = hidden @ tensors["fc1_weight"][j]
    if "fc1_bias" in tensors:
        hidden = hidden + tensors["fc1_bias"][j]
    h = tensors["fc2_weight"].shape[2]
    activated = activation(hidden[len(hidden) - h :])  # all of it, or the second half
    return activated if len(hidden) == h else hidden[:h] * activated


def reference_slot_input(slot_logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean (d) of the tokens (m,d) weighted by the softmax of the logits (m)."""
    weights = (slot_logits - slot_logits.max()).exp()
    return (weights / weights.sum()) @ tokens


def reference_slot_output(
    slot_logits: Tensor,
    tokens: Tensor,
    tensors: Mapping[str, Tensor],
    j: int,
    activation: Callable[[Tensor], Tensor] = gelu,
) -> Tensor:
    """f (d): expert j on the mean of the tokens weighted by the softmax of the logits (m)."""
    output = tensors["fc2_weight"][j] @ reference_hidden(slot_logits, tokens, tensors, j, activation)
    return output + tensors["fc2_bias"][j] if "fc2_bias" in tensors else output


def reference_mass(
    x: Tensor, tensors: Mapping[str, Tensor], router_norm: str, dispatch_input: str
) -> list[list[float]]:
    """The share of each expert in the combine weights of each input: b rows of n numbers."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    masses = []
    for one in x.double():
        logits, _ = reference_router(one, tensors, router_norm, dispatch_input)
        combine = reference_combine(logits, range(logits.shape[1]))
        masses.append([float(combine[:, j].sum()) / len(one) for j in range(logits.shape[1])])
    return masses


def best_subset(scores: Sequence[float], k: int) -> tuple[int, ...]:
    """The k experts of the greatest summed score, by trying all; of equal ones the first."""
    return max(combinations(range(len(scores)), k), key=lambda experts: sum(scores[j] for j in experts))


def replace(config, **changes):
    """A record or dataclass with some fields changed."""
    if dataclasses.is_dataclass(config):
        return dataclasses.replace(config, **changes)
    return config.replace(**changes)


def observe_layers(model, names, observe, inputs, runtime) -> None:
    """Run a model and hand the observation of each named layer to `observe`, with its name."""
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.observer = functools.partial(observe, name)
    runtime.forward(model, inputs)
    for layer in layers.values():
        layer.observer = None
