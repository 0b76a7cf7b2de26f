"""The tables of all models against our modules and the reference's complete lists of names."""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discriminator_names import patchgan_rules
from PIL import Image
from tiny import narrow
from torch_states import read_buffers, to_torch

from tokenflow_jax.nets.discriminator import PatchGAN
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow
from tokenflow_jax.tokenizer.names import tokenizer_buffers, tokenizer_table
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.names.encoders import CLIP_VISUAL

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
CASES = {
    "clipb_224": "b",
    "clipb_256_enhanced": "b_256_enhanced",
    "vitamin_256": "l",
    "siglip_384": "xl",
}


def manifest(name):
    return json.loads((GOLDEN / f"{name}.manifest.json").read_text())


def template(module, image_size, *arguments):
    images = jnp.zeros((1, image_size, image_size, 3))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), images, *arguments))


def config_of(case, shrink=1):
    return narrow(VARIANTS[CASES[case]], shrink)


def tokenizer_template(config):
    return template(TokenFlow(config), config.image_size)["params"]


def narrower(shapes, shrink):
    """Narrow the reference's shapes; 32 and 8 code channels, 197 tokens, ... stay."""
    return {
        # 4304 is the width of SigLIP's MLP.
        name: [size // shrink if size % 64 == 0 or size == 4304 else size for size in shape]
        for name, shape in shapes.items()
    }


def assert_round_trip(state, table, shapes):
    tree = rules.to_flax(state, table, shapes)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, shapes)
    back = to_torch(tree, table, read_buffers(state, table))
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
        assert back[name].tobytes() == array.tobytes(), name
    return tree


@pytest.mark.parametrize("case", CASES)
def test_every_name_and_shape_of_the_full_tokenizer(case):
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        for name, shape in manifest(f"tokenizer_{case}").items()
    }
    config = config_of(case)
    assert not rules.check(shapes, tokenizer_table(config), tokenizer_template(config))
    other = config_of(next(name for name in CASES if name != case))
    assert len(rules.check(shapes, tokenizer_table(other), tokenizer_template(other))) > 100
    for name, buffer in tokenizer_buffers(config).items():
        assert buffer.shape == shapes[name].shape, name
    parameters = sum(len(names) for names in _names(config))
    assert parameters + len(tokenizer_buffers(config)) == len(shapes)


def _names(config):
    for path, leaf in rules.flatten(tokenizer_template(config)).items():
        yield tokenizer_table(config).find(path, leaf.shape)[1]


@pytest.mark.parametrize("case", CASES)
def test_narrow_tokenizer_round_trip(case):
    state = WEIGHTS["state_dict"](narrower(manifest(f"tokenizer_{case}"), 8), 3)
    config = config_of(case, 8)
    tree = assert_round_trip(state, tokenizer_table(config), tokenizer_template(config))
    # Spot checks of orientation and order, spelled out rather than through the rules.
    qkv = tree["semantic_encoder"]["blocks"]["attention"]["qkv"]["kernel"][11]
    names = {
        "clip": ["transformer.resblocks.11.attn.in_proj_weight"],
        "vitamin": ["blocks.11.attn.qkv.weight"],
        "siglip": [f"vision_model.encoder.layers.11.self_attn.{p}_proj.weight" for p in "qkv"],
    }[config.semantic_encoder]
    parts = [state[f"encoder_vqkd.{name}"].T for name in names]
    np.testing.assert_array_equal(qkv, np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(
        tree["pixel_decoder"]["level_1_up"]["kernel"],
        state["decoder.conv_blocks.1.upsample.conv.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        tree["pixel_encoder"]["mid_attn"]["out"]["kernel"],
        state["encoder.mid.1.proj_out.weight"][:, :, 0, 0].T,
    )
    np.testing.assert_array_equal(
        tree["semantic_decoder"]["position_embedding"], state["decoder_vqkd.pos_embed"][0]
    )


def test_three_wrong_tensors_are_all_reported():
    state = WEIGHTS["state_dict"](narrower(manifest("tokenizer_clipb_224"), 8), 0)
    state["quant_conv.weight"] = state["quant_conv.weight"][:-1]
    state["encoder.conv_inn.bias"] = state.pop("encoder.conv_in.bias")
    with pytest.raises(rules.CheckpointMismatch) as caught:
        config = config_of("clipb_224", 8)
        rules.to_flax(state, tokenizer_table(config), tokenizer_template(config))
    text = str(caught.value)
    assert "3 problems" in text
    for part in (
        "quant_conv.weight: (7, 32, 1, 1) in the checkpoint, (8, 32, 1, 1) in the model",
        "encoder.conv_in.bias: missing from the checkpoint",
        "encoder.conv_inn.bias: not in the model",
    ):
        assert part in text


def test_a_fresh_decoder_can_be_left_out():
    """Switching to the enhanced decoder keeps the rest of a normal checkpoint."""
    state = WEIGHTS["state_dict"](narrower(manifest("tokenizer_clipb_224"), 8), 0)
    config = dataclasses.replace(config_of("clipb_224", 8), decoder_channels=32, decoder_blocks=5)
    shapes = tokenizer_template(config)
    del shapes["pixel_decoder"]
    table = tokenizer_table(config)
    table = dataclasses.replace(table, ignored=(*table.ignored, "decoder.*"))
    tree = rules.to_flax(state, table, shapes)
    assert tree.keys() == shapes.keys()


def test_patchgan_round_trip_with_statistics():
    shapes = template(PatchGAN(), 64, False)
    state = WEIGHTS["state_dict"](manifest("parts.patchgan"), 0)
    state["main.3.num_batches_tracked"] += 5
    tree = assert_round_trip(state, patchgan_rules(), shapes)
    np.testing.assert_array_equal(tree["batch_stats"]["norm_2"]["var"], state["main.6.running_var"])


@pytest.mark.parametrize("layers", [1, 4])
def test_patchgan_of_other_depths(layers):
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: random.random(leaf.shape, np.float32),
        template(PatchGAN(filters=8, layers=layers), 64, False),
    )
    state = to_torch(variables, patchgan_rules(layers))
    assert f"main.{3 * layers + 2}.bias" in state
    tree = rules.to_flax(state, patchgan_rules(layers), variables)
    jax.tree.map(np.testing.assert_array_equal, tree, variables)


def test_clip_visual_tower_inside_a_whole_clip():
    state = WEIGHTS["state_dict"](narrower(manifest("loss_clipb_224.teacher"), 16), 0)
    shapes = template(ViT(ViTConfig(width=48, projection=32)), 224)["params"]
    tree = rules.to_flax(state, CLIP_VISUAL, shapes)
    back = to_torch(tree, CLIP_VISUAL)
    assert back.keys() == {name for name in state if name.startswith("visual.")}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_teacher_features_equal_the_reference():
    shapes = manifest("loss_clipb_224.teacher")
    visual = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    vit = ViT(ViTConfig(projection=512))
    params = rules.to_flax(
        WEIGHTS["state_dict"](visual, 0), CLIP_VISUAL, template(vit, 224)["params"]
    )
    pixels = np.asarray(Image.open(GOLDEN / "images/astronaut_224.png"), np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    deviation = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    features = jax.jit(vit.apply)({"params": params}, ((pixels - mean) / deviation)[None])
    expected = np.load(GOLDEN / "parts_small.npz")["teacher_target_every_7th"]
    np.testing.assert_allclose(features[0, ::7], expected, atol=1e-4)
