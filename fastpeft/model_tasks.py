"""PeftModel by task. Each states the forward of its task in full: Trainer reads column and label names from it.

An argument that is None is not passed on, so a base model needs to accept only what it is given.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.config import PeftConfig
from fastpeft.peft_model import PeftModel


class _TaskModel(PeftModel):
    """What the task classes share."""

    def _forward_task(self, task_ids: Tensor | None, kwargs: dict[str, Any], **inputs: Any) -> Any:
        """Call the base model with the inputs that are given and with kwargs, special arguments taken out."""
        self._refuse_task_ids(task_ids)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        with self._enable_peft_forward_hooks(**kwargs):
            return self.base_model(**inputs, **self._base_kwargs(kwargs))

    def _refuse_task_ids(self, task_ids: Tensor | None) -> None:
        if task_ids is not None:
            raise NotImplementedError(
                f"task_ids belongs to methods that learn several tasks in one adapter; {self.peft_type} is not one"
            )

    def _return_dict(self, return_dict: bool | None) -> bool:
        """The caller's choice, else the base model's setting."""
        return getattr(getattr(self, "config", None), "return_dict", True) if return_dict is None else return_dict


class _ModelWithHead(_TaskModel):
    """A task whose head is new and trains in full beside the adapter: it is added to the config's modules_to_save."""

    _head_names: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        self._train_head(peft_config)  # before layers are wrapped, so that target_modules cannot match the head
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter with a head of its own; all else as PeftModel.add_adapter."""
        self._train_head(peft_config)
        super().add_adapter(
            adapter_name,
            peft_config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @property
    def cls_layer_name(self) -> str:
        """Name of the base model's child that is the head."""
        for name, _ in self.get_base_model().named_children():
            if any(head in name for head in self.modules_to_save or ()):
                return name
        raise AttributeError("cls_layer_name")

    def _train_head(self, config: PeftConfig) -> None:
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *self._head_names]))


class _Classifier(_ModelWithHead):
    """What the two that label have in common."""

    _head_names = ("classifier", "score")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._forward_task(
            task_ids,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self._return_dict(return_dict),
        )


class PeftModelForSequenceClassification(_Classifier):
    """A model that labels sequences. Its head, `classifier` or `score`, trains and is saved with the adapter."""


class PeftModelForTokenClassification(_Classifier):
    """A model that labels tokens. Its head, `classifier` or `score`, trains and is saved with the adapter."""


class PeftModelForQuestionAnswering(_ModelWithHead):
    """A model that finds answer spans. Its head, `qa_outputs`, trains and is saved with the adapter."""

    _head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward. token_type_ids and position_ids reach it too; reference PEFT 0.21 drops them."""
        return self._forward_task(
            task_ids,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self._return_dict(return_dict),
        )


class PeftModelForFeatureExtraction(_TaskModel):
    """A model whose hidden states are used, for example as embeddings."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._forward_task(
            task_ids,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


class _GeneratingModel(_TaskModel):
    """A language model: generation is the base model's own, run with the adapters."""

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base model's method; `prepare_inputs_for_generation` calls it."""
        return self.base_model.prepare_inputs_for_generation

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of one decoding step, as the base model wants them."""
        self._refuse_task_ids(task_ids)
        inputs: dict[str, Any] = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, by the generation config that was set on this wrapper if one was."""
        base: Any = self.get_base_model()
        if "generation_config" in self.__dict__:
            base.generation_config = self.generation_config
        with self._generation(args, kwargs):
            return base.generate(*args, **self._base_kwargs(kwargs))


class PeftModelForCausalLM(_GeneratingModel):
    """A model that predicts the next token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._forward_task(
            task_ids,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of one decoding step, without cache_position, which the model works out itself."""
        inputs = super().prepare_inputs_for_generation(*args, task_ids=task_ids, **kwargs)
        inputs.pop("cache_position", None)
        return inputs


class PeftModelForSeq2SeqLM(_GeneratingModel):
    """An encoder-decoder that predicts the next token of its output."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._forward_task(
            task_ids,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def generate(self, **kwargs: Any) -> Any:
        return self._generate(**kwargs)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
