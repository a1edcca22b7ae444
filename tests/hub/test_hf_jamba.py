"""Jamba and Mixtral folders of transformers: what they compute, and back exactly."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

import lclm
from lclm import hub
from lclm.errors import LclmError
from lclm.hub.hf_config import config_from_hf, config_to_hf
from lclm.hub.hf_folder import load_hf, save_hf
from lclm.hub.names import gguf_names
from lclm.models.decoder import Decoder, unembed
from lclm.ops import moe
from lclm.specs import AttentionSpec, MambaSpec, MlpSpec, MoeSpec
from lclm.tree import flatten

NAMES = ("jamba", "mixtral")
EXPERT = {
    "jamba": "model.layers.1.feed_forward.experts.{}.down_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.{}.w2.weight",
}


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """(name, loaded model, arrays of the oracle)."""
    with np.load(GOLDEN / request.param / "golden.npz") as arrays:
        return request.param, lclm.load(GOLDEN / request.param), dict(arrays)


@pytest.mark.slow
def test_loss_gradients_and_load_balance_are_those_of_transformers(golden):
    _, lm, arrays = golden
    text = jnp.asarray(arrays["tokens"])

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        hidden, _ = Decoder(lm.config).apply({"params": params}, text)
        logp = jax.nn.log_softmax(unembed(lm.config, params, hidden)[:, :-1])
        return -jnp.take_along_axis(logp, text[:, 1:, None], -1).mean()

    value, grads = loss(lm.params)
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    block = grads["layers_1"]["mlp"]
    for found, key in (
        (block["router"]["weight"], "grad_router"),
        (block["experts"]["down"][0], "grad_down"),
        (grads["embed"]["table"].at[0].set(0), "grad_embed"),
    ):
        if key == "grad_embed":  # transformers learns nothing for Jamba's padding, 0
            arrays[key][0] = 0
        limit = 2e-5 * np.abs(arrays[key]).max()
        assert np.abs(found - arrays[key]).max() <= limit, key
    _, out = Decoder(lm.config).apply({"params": lm.params}, text, mutable=["router"])
    plain = moe.aux_loss(out["router"])
    masked = moe.aux_loss(out["router"], jnp.asarray(arrays["mask"]) > 0)
    np.testing.assert_allclose(plain, arrays["aux"], rtol=1e-5)
    np.testing.assert_allclose(masked, arrays["aux_masked"], rtol=1e-5)


@pytest.mark.slow
def test_a_prompt_read_in_chunks_continues_as_one_shot_says(golden):
    _, lm, arrays = golden
    prompt = arrays["tokens"][0]
    text = list(prompt)
    for _ in range(4):
        padded = np.zeros((1, len(prompt) + 4), np.int32)
        padded[0, : len(text)] = text
        text.append(int(lm.logits(padded)[0, len(text) - 1].argmax()))
    for chunk in (5, 24):
        out = lm.prefill(prompt, chunk=chunk).generate([], max_new_tokens=4)
        kept = list(out.tokens)
        assert kept == text[len(prompt) :][: len(kept)] and kept


def test_a_folder_is_written_back_bit_for_bit(golden, tmp_path):
    name, _, _ = golden
    bundle = hub.load(GOLDEN / name)
    save_hf(tmp_path / "out", bundle)
    old = load_file(GOLDEN / name / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    for key in old:
        assert old[key].dtype == new[key].dtype
        assert old[key].tobytes() == new[key].tobytes(), key
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ours.keys() & theirs.keys() - {"head_dim"}:
        assert ours[key] == theirs[key], key
    assert load_hf(tmp_path / "out").config == bundle.config


def test_all_missing_and_extra_tensors_are_named_at_once(golden, hf_folder):
    name, _, _ = golden
    folder = hf_folder(name)
    tensors = load_file(folder / "model.safetensors")
    gone = [EXPERT[name].format(1), EXPERT[name].format(3), "model.embed_tokens.weight"]
    for key in gone:
        del tensors[key]
    added = [EXPERT[name].format(4), "model.layers.9.mystery"]
    tensors |= {key: np.zeros(3, np.float32) for key in added}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LclmError, match="3 missing") as error:
        load_hf(folder)
    assert all(key in str(error.value) for key in gone + added)


def test_an_expert_of_another_shape_is_named(golden, hf_folder):
    name, _, _ = golden
    folder = hf_folder(name)
    tensors = load_file(folder / "model.safetensors")
    key = EXPERT[name].format(2)
    tensors[key] = np.zeros((5, 5), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LclmError, match="another shape") as error:
        load_hf(folder)
    assert key in str(error.value)


def table(**changes):
    """The config.json of transformers' own Jamba defaults, with changes."""
    return {"model_type": "jamba", **changes}


def kinds(config):
    mixers = "".join(
        "a" if isinstance(s.mixer, AttentionSpec) else "m" for s in config.layers
    )
    mlps = "".join("e" if isinstance(s.mlp, MoeSpec) else "d" for s in config.layers)
    return mixers, mlps


def test_jamba_defaults_are_the_published_pattern():
    config = config_from_hf(table())
    assert kinds(config) == ("mmmmammm" * 4, "de" * 16)
    assert len(config.stack) == 1 and config.stack[0].repeats == 4
    mamba, attention = config.layers[0].mixer, config.layers[4].mixer
    assert mamba == MambaSpec(8192, 256, inner_norms=True)
    assert attention == AttentionSpec(32, 8, 128, rope=None)
    assert config.layers[0].mlp == MlpSpec(14336)
    assert config.layers[1].mlp == MoeSpec(14336, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 5, "attn_layer_offset": 1},
        {"num_hidden_layers": 12, "attn_layer_period": 3, "attn_layer_offset": 0},
        {"num_hidden_layers": 3},
        {"num_experts": 1},
        {"num_hidden_layers": 6, "expert_layer_period": 1, "expert_layer_offset": 0},
        {"attn_layer_period": 1, "attn_layer_offset": 0, "num_hidden_layers": 4},
        {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_dt_rank": 7},
        {"eos_token_id": [2, 518], "tie_word_embeddings": True, "hidden_act": "gelu"},
    ],
)
def test_a_jamba_config_survives_writing(changes):
    config = config_from_hf(table(**changes))
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"attn_layer_offset": 8}, "attention layer offset is 8 with a period of 8"),
        ({"expert_layer_offset": 2}, "expert layer offset is 2"),
        ({"expert_layer_offset": -1}, "an offset is 0 to 1"),
        ({"attn_layer_period": 0}, "attn_layer_period is 0"),
        ({"num_experts_per_tok": 17}, "top 17 of 16 experts"),
        ({"num_attention_heads": 30}, "hidden_size 4096 over 30 heads"),
        ({"num_key_value_heads": 5}, "32 heads over 5 kv heads"),
        ({"mamba_d_conv": 0}, "mamba_d_conv is 0"),
        ({"mamba_inner_layernorms": False}, "only True is implemented"),
        ({"num_shared_experts": 1}, "unknown key 'num_shared_experts'"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
    ],
)
def test_a_jamba_config_that_cannot_be_is_refused(changes, words):
    with pytest.raises(LclmError, match=words):
        config_from_hf(table(**changes))


def test_a_mixtral_config_survives_writing():
    published = {
        "model_type": "mixtral",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    }
    config = config_from_hf(published)
    assert config.layers[0].mlp == MoeSpec(14336, 8, renormalise=True)
    assert config_from_hf(config_to_hf(config)) == config
    with pytest.raises(LclmError, match="router_jitter_noise"):
        config_from_hf(published | {"router_jitter_noise": 0.1})


def write_gguf(path, bundle, kv_heads):
    """The model as llama.cpp's converter stores it."""
    config, names = bundle.config, gguf_names(bundle.config)
    mamba, experts = config.layers[0].mixer, config.layers[1].mlp
    writer = gguf.GGUFWriter(path, "jamba")
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(experts.width)
    writer.add_head_count(config.layers[2].mixer.heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    writer.add_ssm_conv_kernel(mamba.conv)
    writer.add_ssm_inner_size(mamba.inner)
    writer.add_ssm_state_size(mamba.state)
    writer.add_ssm_time_step_rank(mamba.rank)
    writer.add_expert_count(experts.experts)
    writer.add_expert_used_count(experts.top)
    for key, value in flatten(bundle.params).items():
        value = np.asarray(value)
        if key.endswith("a_log"):
            value = -np.exp(value)
        writer.add_tensor(names[key], value.squeeze())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_weights_of_hugging_face(tmp_path):
    bundle, path = hub.load(GOLDEN / "jamba"), tmp_path / "m.gguf"
    write_gguf(path, bundle, [0, 0, 2, 0])
    read = hub.load(path)
    assert read.config.layers == bundle.config.layers
    want = flatten(bundle.params)
    assert flatten(read.params).keys() == want.keys()
    for key, value in flatten(read.params).items():
        limit = 1e-6 if key.endswith("a_log") else 0
        np.testing.assert_allclose(value, want[key], atol=limit)
    known = set(gguf.TENSOR_NAMES.values())
    for name in gguf_names(bundle.config).values():
        block = name.removesuffix(".weight").removesuffix(".bias").split(".")
        whole = "blk.{bid}." + block[-1] if block[0] == "blk" else block[-1]
        assert whole in known


def test_a_gguf_file_must_say_which_layers_attend(tmp_path):
    bundle, path = hub.load(GOLDEN / "jamba"), tmp_path / "m.gguf"
    write_gguf(path, bundle, [0, 0, 2])
    with pytest.raises(LclmError, match="one number for each of its 4 layers"):
        hub.load(path)


def write_mixtral_gguf(path, bundle, arch="llama"):
    """The model as llama.cpp's converter stores it: q and k rows interleaved."""
    config, names = bundle.config, gguf_names(bundle.config)
    attention, experts = config.layers[0].mixer, config.layers[0].mlp
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(experts.width)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_freq_base(attention.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    writer.add_expert_count(experts.experts)
    writer.add_expert_used_count(experts.top)
    for key, value in flatten(bundle.params).items():
        value = np.asarray(value)
        if key.endswith(("attn/q/weight", "attn/k/weight")):
            pairs = value.reshape(-1, 2, attention.head_dim // 2, value.shape[1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names[key], np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_mixtral_gguf_gives_the_weights_of_hugging_face(tmp_path):
    bundle, path = hub.load(GOLDEN / "mixtral"), tmp_path / "m.gguf"
    write_mixtral_gguf(path, bundle)
    read = hub.load(path)
    assert read.config.family == "mixtral"
    assert [x.mlp for x in read.config.layers] == [x.mlp for x in bundle.config.layers]
    want = flatten(bundle.params)
    assert flatten(read.params).keys() == want.keys()
    for key, value in flatten(read.params).items():
        np.testing.assert_array_equal(value, want[key])
    known = set(gguf.TENSOR_NAMES.values())
    for name in gguf_names(bundle.config).values():
        block = name.removesuffix(".weight").split(".")
        assert ("blk.{bid}." + block[-1] if block[0] == "blk" else block[-1]) in known


def test_experts_of_another_gguf_architecture_are_refused(tmp_path):
    bundle, path = hub.load(GOLDEN / "mixtral"), tmp_path / "m.gguf"
    write_mixtral_gguf(path, bundle, "qwen3")
    with pytest.raises(LclmError, match="architectures llama"):
        hub.load(path)
