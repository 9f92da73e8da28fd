"""FLOPs of Hugging Face's models in a plain loop: masks, padding and labels, autocast and checkpointing, as counted live."""

from __future__ import annotations

import contextlib

import pytest
import torch

from green_torch.flops import LiveCounter, StepFlops

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, WORDS, WIDTH, INNER, LAYERS = 2, 16, 96, 32, 64, 2
ROWS = BATCH * LENGTH
SAME = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GROUPED = SAME | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}

MODELS = {
    "GPT2LMHeadModel": {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "LlamaForCausalLM": GROUPED,
    "BertForMaskedLM": SAME,
    "T5ForConditionalGeneration": {
        "vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0
    },
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4, "output_router_logits": True},
    "Qwen2MoeForCausalLM": GROUPED | EXPERTS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name):
    kind = getattr(transformers, name)
    return kind(kind.config_class(**MODELS[name])).train()


def batch():
    ids = torch.randint(3, WORDS, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def by_hand(name):
    """Forward's multiply-adds of one token, three times: attention is scores and product over all the length."""
    attention = LAYERS * 2 * LENGTH * WIDTH
    projections = {"GPT2LMHeadModel": 4 * WIDTH * WIDTH, "LlamaForCausalLM": 3 * WIDTH * WIDTH}[name]
    inner = {"GPT2LMHeadModel": 2, "LlamaForCausalLM": 3}[name] * WIDTH * INNER * (2 if name[0] == "G" else 1)
    return 3 * 2 * ROWS * (attention + LAYERS * (projections + inner) + WIDTH * WORDS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("autocast", "checkpointed"), [(False, False), (True, True)])
def test_plain_loop_equals_live(name, autocast, checkpointed):
    """A padded batch with labels has the FLOPs on meta that it has live, by hand where that is short; nothing is warned of."""
    model, said, inputs = build(name), [], batch()
    if checkpointed:
        model.gradient_checkpointing_enable()

    def step():
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(**inputs).loss
        loss.backward()

    flops = StepFlops(model, warn=said.append)
    flops.attach()
    step()
    work = flops.take()
    flops.detach()
    assert not said
    with LiveCounter() as counter:
        step()
    assert work.flops.model_flops == counter.count().model_flops
    if name in {"GPT2LMHeadModel", "LlamaForCausalLM"}:
        assert work.flops.model_flops == by_hand(name)


def test_a_full_batch_after_a_padded_one_is_the_same_key():
    """Values don't count anew: keys are shapes."""
    model, inputs = build("LlamaForCausalLM"), batch()
    flops = StepFlops(model)
    flops.attach()
    flags = []
    for _ in range(2):
        model(**inputs).loss.backward()
        flags.append(flops.take().flags)
        inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    assert [len(found) for found in flags] == [1, 0]
