"""The loss of each kind of model is the one that Trainer alone trains, or the model is refused."""

import pytest
import torch
from joint_runs import PAD, arguments, logged, rows, weights
from models import VOCAB, batch, build
from transformers import Trainer, default_data_collator

from fastpeft import LoraConfig, get_peft_model
from fastpeft.joint import AdapterTraining, JointTrainer
from fastpeft.joint.losses import check_loss

TARGETS = {
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "value"]},
    "t5": {"target_modules": ["q", "v"]},
    "llama": {"target_modules": ["q_proj", "v_proj"]},
}


def with_adapters(make, target, names="wx"):
    base, model = make(), None
    for name in names:
        torch.manual_seed(ord(name))
        config = LoraConfig(r=4, **TARGETS[target])
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def masked_lm():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    sizes["initializer_range"] = 0.1
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, **sizes, **drop))


def mixtral(**more):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    more |= {"initializer_range": 0.1, "intermediate_size": 24, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **sizes, **more))


def sequence_classifier(**more):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB, intermediate_size=24, **sizes, **more))


def tokens(seed):
    return rows(8, seed)


def columns(family):
    def made(seed):
        found = batch(family, rows=8, seed=seed)
        return [{key: column[i] for key, column in found.items()} for i in range(8)]

    return made


KINDS = {
    "causal, loss_type None": (lambda: build("gpt2"), "gpt2", tokens, PAD),
    "causal experts, no router's loss": (mixtral, "llama", tokens, PAD),
    "masked": (masked_lm, "bert", tokens, PAD),
    "token classes": (lambda: build("bert_tagger"), "bert", columns("bert_tagger"), default_data_collator),
    "row classes": (lambda: build("bert_classifier"), "bert", columns("bert_classifier"), default_data_collator),
    "encoder and decoder": (lambda: build("t5"), "t5", columns("t5"), default_data_collator),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_trainer_alone(kind, tmp_path):
    make, target, data, collator = KINDS[kind]
    trainings = {name: AdapterTraining(train_dataset=data(seed)) for seed, name in enumerate("wx", start=1)}
    together = JointTrainer(
        with_adapters(make, target), arguments(tmp_path, max_steps=3), trainings, data_collator=collator
    )
    together.train()
    for name, training in trainings.items():
        model = with_adapters(make, target, name)
        single = Trainer(
            model, arguments(tmp_path, max_steps=3), train_dataset=training.train_dataset, data_collator=collator
        )
        single.train()
        assert logged(together, f"loss/{name}") == pytest.approx(logged(single, "loss"), rel=1e-5)
        for key, wanted in weights(model, name).items():
            torch.testing.assert_close(weights(together.model, name)[key], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (lambda: mixtral(output_router_logits=True), "llama", r"a loss of its router .* set it to False, or give"),
        (lambda: sequence_classifier(num_labels=1), "llama", r"is for regression \(problem_type, or num_labels=1"),
        (lambda: sequence_classifier(problem_type="multi_label_classification"), "llama", "for multi_label_class"),
        (lambda: build("bert"), "bert", r"the loss of BertModel is not known \(loss_type=None\)"),
        (lambda: build("bert_qa"), "bert", r"is not known \(loss_type=ForQuestionAnswering\)"),
    ],
    ids=["router", "regression", "several labels", "no head", "question answering"],
)
def test_a_model_with_another_loss_needs_one(make, target, message, tmp_path):
    trainings = {"w": AdapterTraining(train_dataset=tokens(1))}
    model = with_adapters(make, target)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message + r".*compute_loss_func"):
        JointTrainer(model, arguments(tmp_path), trainings, data_collator=PAD)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    JointTrainer(
        model, arguments(tmp_path), trainings, data_collator=PAD,
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(),
    )  # fmt: skip


def test_a_router_is_found_in_the_part_that_reads_text():
    from transformers import LlavaConfig, MixtralConfig

    base = build("llama")
    base.config = LlavaConfig(text_config=MixtralConfig(output_router_logits=True))
    with pytest.raises(ValueError, match="a loss of its router"):
        check_loss(base)
    base.config = LlavaConfig(text_config=MixtralConfig())
    check_loss(base)
