"""The trainer's forward pass: from a collated batch on the device to what its tokens add up to."""

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

_GIVEN = ("input_ids", "attention_mask", "position_ids")


class TokenForward:
    """Runs a model over batches of `collation.Collator`, with its head fused to the loss where the model allows it.

    Args:
        model: a causal LM, wrapped with an adapter or not; its head is replaced for calls with an objective.
        settings: how the loss is computed.
        head: of the model, where it is known; else it is found by running the model on a few tokens.

    Attributes:
        causal_lm: the model beneath its adapter.

    Raises:
        UserError: the balance of experts is asked for, and the head cannot be fused.
    """

    def __init__(self, model: Any, settings: LossSettings, head: OutputHead | None = None) -> None:
        objective = settings.objective
        self.causal_lm: Any = without_adapter(model)
        self._config = self.causal_lm.config
        self._objective, self._eval_objective = objective, Objective(entropy=objective.entropy)
        self._reason_for_logits = fused_linear.install(self.causal_lm, settings.chunk_size, head, outermost=model)
        if self._reason_for_logits and objective.router_aux:
            message = f"the experts of {type(self.causal_lm).__name__} cannot be balanced: {self._reason_for_logits}"
            hint = "Set it to 0: the loss is then that of the tokens alone."
            raise UserError(Problem(message, hint, "router_aux_loss_coef"))
        if self._reason_for_logits:
            logger.info("All logits of a pass are held at once: %s", self._reason_for_logits)

    def __call__(
        self, model: torch.nn.Module, inputs: dict[str, Any], gradient_scale: torch.Tensor | None = None
    ) -> TokenLoss:
        """The sums of one batch; the model's logits are held a few rows at a time, where its head allows it.

        Args:
            model: as it was given, or as parallel training has wrapped it since.
            gradient_scale: what the objective will be multiplied by, so that its gradients are rounded once.
        """
        kept: dict[str, Any] = {name: inputs[name] for name in _GIVEN if name in inputs}
        if "documents" in inputs:
            kept |= attention_inputs(self._config, inputs["documents"])
        # With a cache, attention would no longer be restricted by position_ids to one document of a packed row.
        objective = self._objective if model.training else self._eval_objective
        if self._reason_for_logits is None:
            labels = {name: inputs[name] for name in ("labels", "trained_positions")}
            sums = model(**kept, **labels, objective=objective, gradient_scale=gradient_scale, use_cache=False)
            return TokenLoss(**sums)
        logits = model(**kept, use_cache=False).logits
        return token_loss(logits, inputs["labels"], objective, inputs["trained_positions"])
