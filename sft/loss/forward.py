"""The trainer's forward pass: from a collated batch on the device to the sums over its tokens."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sft.errors import Problem, UserError
from sft.loss import fused_linear
from sft.loss.output_head import OutputHead
from sft.loss.token_loss import LossSettings, Objective, TokenLoss, token_loss
from sft.model.attention.document_attention import attention_inputs
from sft.model.lora import without_adapter

logger = logging.getLogger("sft")

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class TokenForward:
    """Runs a model over batches of `Collator`, with its head fused to the loss where the model allows it.

    Args:
        model: a causal LM, with or without an adapter; its head is replaced for calls with an objective.
        settings: how the loss is computed.
        head: of the model, where it is known; else it is found by running the model on a few tokens.

    Attributes:
        causal_lm: the model without its adapter.
        unfused_reason: why the head is not fused and all logits of a batch are held at once; None where it is fused.

    Raises:
        UserError: load balancing of experts is asked for, and the head cannot be fused.
    """

    def __init__(self, model: Any, settings: LossSettings, head: OutputHead | None = None) -> None:
        self.causal_lm: Any = without_adapter(model)
        self._objective = settings.objective
        self._eval_objective = Objective(entropy=settings.objective.entropy)
        self.unfused_reason = fused_linear.install(self.causal_lm, settings.chunk_size, head, outermost=model)
        if self.unfused_reason and settings.objective.router_aux:
            message = f"the experts of {type(self.causal_lm).__name__} cannot be balanced: {self.unfused_reason}"
            hint = "Set it to 0: the loss is then that of the tokens alone."
            raise UserError(Problem(message, hint, "router_aux_loss_coef"))
        if self.unfused_reason:
            logger.info("All logits of a micro-batch are held at once: %s", self.unfused_reason)

    def __call__(
        self, model: torch.nn.Module, inputs: dict[str, Any], gradient_scale: torch.Tensor | None = None
    ) -> TokenLoss:
        """Returns the sums of one batch; the logits are held in chunks of tokens where the head is fused.

        Args:
            model: as it was given, or as parallel training has wrapped it since.
            gradient_scale: what the objective will be multiplied by, so that its gradients are rounded once.
        """
        kept: dict[str, Any] = {name: inputs[name] for name in _MODEL_INPUTS if name in inputs}
        if "documents" in inputs:
            kept |= attention_inputs(self.causal_lm.config, inputs["documents"])
        # With a cache, attention would no longer be restricted by position_ids to one document of a packed sequence.
        objective = self._objective if model.training else self._eval_objective
        if self.unfused_reason is None:
            labels = {name: inputs[name] for name in ("labels", "trained_positions")}
            sums = model(**kept, **labels, objective=objective, gradient_scale=gradient_scale, use_cache=False)
            return TokenLoss(**sums)
        logits = model(**kept, use_cache=False).logits
        return token_loss(logits, inputs["labels"], objective, inputs["trained_positions"])
