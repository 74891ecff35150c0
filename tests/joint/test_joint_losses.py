"""The loss of each kind of model is the one that Trainer alone trains, or the model is refused."""

import pytest
import torch
from joint_runs import PAD, arguments, logged, rows, weights
from models import VOCAB, batch, build
from torch.nn.functional import cross_entropy
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


def causal(power, smoothing=0.0):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        of_tokens = cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)
        counted = wanted.ne(-100)
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return (of_tokens * counted).pow(power).sum() / count

    return loss


@pytest.mark.parametrize("of_all", [None, causal(1.0, 0.3)], ids=["the model's", "the trainer's"])
def test_an_adapter_may_have_a_loss_of_its_own(of_all, tmp_path):
    """w and x have each their own, y what all have: each is trained and measured as alone with that function."""
    functions = {"w": causal(1.0, 0.1), "x": causal(1.5), "y": None}
    trainings = {
        name: AdapterTraining(train_dataset=rows(7, seed), eval_dataset=rows(4, seed + 9), compute_loss_func=function)
        for seed, (name, function) in enumerate(functions.items(), start=1)
    }
    more = {"gradient_accumulation_steps": 2, "max_steps": 3}
    model = with_adapters(lambda: build("llama"), "llama", "wxy")
    together = JointTrainer(model, arguments(tmp_path, **more), trainings, data_collator=PAD, compute_loss_func=of_all)
    together.train()
    measured = together.evaluate()
    for name, training in trainings.items():
        single = Trainer(
            with_adapters(lambda: build("llama"), "llama", name), arguments(tmp_path, **more), data_collator=PAD,
            train_dataset=training.train_dataset, compute_loss_func=functions[name] or of_all,
        )  # fmt: skip
        single.train()
        assert logged(together, f"loss/{name}") == pytest.approx(logged(single, "loss"), rel=1e-5)
        assert logged(together, f"grad_norm/{name}") == pytest.approx(logged(single, "grad_norm"), rel=1e-4)
        for key, wanted in weights(single.model, name).items():
            torch.testing.assert_close(weights(together.model, name)[key], wanted, rtol=1e-3, atol=1e-5)
        wanted = single.evaluate(training.eval_dataset)["eval_loss"]
        assert measured[f"eval_{name}_loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_model_whose_loss_is_not_known_needs_one_for_every_adapter(tmp_path):
    model = with_adapters(lambda: mixtral(output_router_logits=True), "llama")
    own = {"w": AdapterTraining(train_dataset=tokens(1), compute_loss_func=causal(1.0))}
    with pytest.raises(ValueError, match="a loss of its router"):
        JointTrainer(model, arguments(tmp_path), own | {"x": AdapterTraining(train_dataset=tokens(2))})
    together = JointTrainer(model, arguments(tmp_path), own, data_collator=PAD)
    together.evaluate({"w": tokens(3)})
    with pytest.raises(ValueError, match="a loss of its router"):
        together.evaluate({"x": tokens(3)})


def test_a_router_is_found_in_the_part_that_reads_text():
    from transformers import LlavaConfig, MixtralConfig

    base = build("llama")
    base.config = LlavaConfig(text_config=MixtralConfig(output_router_logits=True))
    with pytest.raises(ValueError, match="a loss of its router"):
        check_loss(base)
    base.config = LlavaConfig(text_config=MixtralConfig())
    check_loss(base)
