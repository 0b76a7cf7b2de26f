"""Every variant of every config builds its model and options; the quickstart's own parts exist."""

import jax
import pytest
from config_files import generation, understanding, unified
from config_files import tokenizer as configs

from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.tokenizer.stage import TokenizerStage
from tokenflow_jax.tokenizer.train import CodebookConfig, LossConfig
from tokenflow_jax.train import optim
from tokenflow_jax.train.run_config import LoopOptions

VARIANTS = (
    "",
    "emoji",
    "emoji_decoder",
    "b",
    "b_released",
    "b_256",
    "b_256_single",
    "b_256_enhanced",
    "l",
    "l_paper",
    "xl",
    "finetune_decoder",
    "finetune_enhanced",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_valid(variant):
    config = configs.get_config(variant)
    TokenizerConfig(**config.model.to_dict())
    LossConfig(**config.losses)
    CodebookConfig(**config.codebook)
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        optim.OptimizerConfig(**optimizer)
    assert LoopOptions.from_config(config).total_steps == config.total_steps
    assert variant in configs.__doc__


def test_the_paper_s_recipe():
    config = configs.get_config("b")
    assert (config.batch_size, config.total_steps) == (256, 1_000_000)
    assert (config.optimizer.learning_rate, config.optimizer.b2) == (1e-4, 0.95)
    assert config.model.codebook_size == 32768 and config.losses.adversarial_weight == 0.5


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match="finetune_decoder"):
        configs.get_config("xxl")


@pytest.mark.parametrize("variant,kind", [("l", "vitamin"), ("xl", "siglip")])
def test_the_large_variants_learn_from_their_own_kind(variant, kind):
    config = configs.get_config(variant)
    assert config.model.semantic_encoder == config.teacher.source == kind
    assert config.teacher.vit == config.model.vit
    assert config.model.teacher_width == config.model.vit.width == 1152
    assert config.total_steps == 500_000
    with pytest.raises(ValueError, match=rf"distils from {kind}.*--config\.teacher\.weights"):
        _stage(config)


def _stage(config):
    return TokenizerStage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1])).open()


def test_b_without_clip_weights_says_where_to_put_them():
    with pytest.raises(ValueError, match=r"--config\.teacher\.weights"):
        _stage(configs.get_config("b"))


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("teacher.source", "dino", "'dino' is not one of"),
        ("model.teacher_width", 7, "teacher_width 7 is not the teacher's 192"),
        ("dtype", "float16", "'float16' is not one of"),
        ("trainable", ("decodr",), "no parameter matches"),
        ("batch_size", 0, "batch_size"),
        ("lpips", "/no/such/file", "/no/such/file"),
        ("discriminator.kind", "gan", "'gan' is not one of"),
    ],
)
def test_bad_values_name_the_remedy(path, value, message):
    config = configs.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        _stage(config)


@pytest.mark.parametrize("file", [configs, generation, understanding, unified])
def test_pictures_outside_the_folder_are_not_read_by_default(file):
    assert file.get_config().data.allow_outside is False


def test_the_stage_hands_the_choice_to_its_data():
    config = configs.get_config()
    config.data.allow_outside = True
    config.data.min_side, config.data.max_aspect = 99, 3
    config.data.shuffle_block, config.data.shuffle_window = 64, 4096
    stage = TokenizerStage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1]))
    (found,) = stage._train_sets.values()
    assert found.allow_outside and (found.min_side, found.max_aspect) == (99, 3)
    assert (found.shuffle_block, found.shuffle_window) == (64, 4096)
