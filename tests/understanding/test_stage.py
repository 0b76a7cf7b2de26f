"""The stage around the step, on a shrunken quickstart: runs, resuming, starts, then answering."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices_program
import tiny as tiny_config
from PIL import Image

import tokenflow_jax as tfx
from tokenflow_jax import answer, convert
from tokenflow_jax.data.chat.opened import ConversationConfig
from tokenflow_jax.data.chat.templates import get_template
from tokenflow_jax.messages import printable
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.train import loop, optim
from tokenflow_jax.train.checkpoint import CheckpointError
from tokenflow_jax.train.run_config import LoopOptions
from tokenflow_jax.understanding.chat import Chat
from tokenflow_jax.understanding.folder import save_understanding_model
from tokenflow_jax.understanding.stage import UnderstandingStage
from tokenflow_jax.weights.language_model import language_model_template, save_language_model

FILE = pathlib.Path(__file__).parents[2] / "configs" / "understanding.py"
SPEC = importlib.util.spec_from_file_location("understanding_config", FILE)
configs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(configs)
VARIANTS = (
    "", "semantic", "pixel", "qwen2_5_14b", "qwen2_5_14b_pretrain", "vicuna_13b",
    "vicuna_13b_pretrain", "smollm2", "smollm2_pretrain",
)  # fmt: skip
LM = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 24}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(tiny_config.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Enough conversations for a held-out tenth; one picture is missing, one is broken."""
    folder = tmp_path_factory.mktemp("chats")
    rng, lines = np.random.default_rng(0), []
    for i in range(110):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"n{i}"}]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
        if i not in (5, 6):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "6.png").write_text("broken")
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return str(folder / "chats.jsonl")


def tiny(tokenizer, chats, **changes):
    """The quickstart's own config with a smaller model, so that it cannot rot."""
    config = configs.get_config()
    config.model.lm.update(**LM)
    config.tokenizer.path = tokenizer
    config.data.name, config.data.path = "jsonl", chats
    config.data.max_length, config.data.buckets = 80, (64, 80)
    config.total_steps, config.batch_size, config.optimizer.warmup_steps = 4, 4, 0
    config.log_every = config.checkpoint_every = 2
    config.image_every = config.eval_every = 0
    config.eval.max_new, config.eval.examples, config.eval.batch_size = 4, 8, 4
    config.update_from_flattened_dict(changes)
    return config


def make(config):
    device_mesh = mesh.make_mesh(config.mesh, jax.devices()[:1])
    return UnderstandingStage(config, device_mesh).open()


def run(config, workdir):
    return loop.train_and_evaluate(config, workdir, make(config)).state


@pytest.fixture(scope="module")
def trained(tokenizer, chats, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return str(workdir), run(tiny(tokenizer, chats), workdir)


def test_a_table_of_conversations_trains_alike(tokenizer, chats, trained, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [json.loads(line) for line in pathlib.Path(chats).read_text().splitlines()]
    for row in rows:
        file = pathlib.Path(chats).with_name(row["image"])
        data = file.read_bytes() if file.exists() else None
        row["image"] = {"bytes": data, "path": file.name}
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet", row_group_size=16)
    table = {"data.name": "parquet", "data.path": str(tmp_path / "chats.parquet")}
    state = run(tiny(tokenizer, chats, **table), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, state.params, trained[1].params)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_valid(variant):
    config = configs.get_config(variant)
    optim.OptimizerConfig(**config.optimizer)
    get_template(config.data.template)
    assert LoopOptions.from_config(config).total_steps == config.total_steps
    assert not variant or variant.removesuffix("_pretrain") in configs.__doc__
    data = config.data
    longest = ConversationConfig(
        data.name, questions=tuple(data.questions), max_length=data.max_length, pack=config.pack,
        buckets=tuple(data.buckets), order=data.order, image_mode=data.image_mode,
        template=data.template,
    ).row_lengths[-1]  # fmt: skip
    assert longest == config.pack * data.max_length and max(data.buckets, default=0) <= longest
    if config.tokenizer.variant:
        config.mesh.data, config.mesh.fsdp = -1, 1
        stage = UnderstandingStage(config, mesh.make_mesh(config.mesh, jax.devices()[:1]), "tpu")
        pretrain = variant.endswith("_pretrain")
        moments = sum(x.size for x in jax.tree.leaves(stage.state_shapes.opt_state))
        total = sum(x.size for x in jax.tree.leaves(stage.state_shapes.params))
        assert (moments < total / 100) == pretrain
        assert (
            stage.vectors
            == {"xl": 27, "b": stage.tokenizer_config.scales[-1]}[config.tokenizer.variant] ** 2
        )


def test_the_paper_s_recipe():
    """docs/reference.md, section 5."""
    one, two = (configs.get_config(f"qwen2_5_14b{end}") for end in ("_pretrain", ""))
    assert (one.batch_size, two.batch_size) == (256, 128)
    assert (one.optimizer.learning_rate, two.optimizer.learning_rate) == (1e-3, 2e-5)
    assert (one.data.template, two.data.template) == ("plain", "qwen_2_5")
    assert (one.data.image_mode, two.data.image_mode) == ("square", "pad")
    assert (one.data.order, two.data.order) == ("random", "grouped")
    assert one.trainable == ("projector",) and two.trainable == ()
    for config in (one, two):
        assert config.data.max_length == 2048 and config.optimizer.clip_norm == 1.0
        assert config.optimizer.warmup_steps == round(0.03 * config.total_steps)
        assert config.optimizer.schedule == "cosine" and config.optimizer.weight_decay == 0


def test_a_run_leaves_what_people_look_for(trained):
    workdir, state = trained
    assert int(state.step) == 4
    names = {path.name for path in (pathlib.Path(workdir) / "images").iterdir()}
    assert "answers_0000004.png" in names
    report = (pathlib.Path(workdir) / "report.html").read_text()
    for text in ("fingerprint", "exact_match_other_images", "largest_answer", "skipped", "What?"):
        assert text in report, text


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(trained, tokenizer, chats, tmp_path):
    run(tiny(tokenizer, chats, total_steps=2), tmp_path)
    config = tiny(tokenizer, chats)
    state = run(config, tmp_path)
    # The schedule's end is part of the run: only the weights after the same schedule are equal.
    assert int(state.step) == 4
    again = run(tiny(tokenizer, chats), tmp_path.parent / "whole")
    jax.tree.map(np.testing.assert_array_equal, trained[1].params, again.params)


@pytest.mark.parametrize("encode", ["once", "step"])
def test_rows_of_all_lengths_are_compiled_before_the_first_step(tokenizer, chats, encode):
    stage = make(tiny(tokenizer, chats, **{"data.encode": encode}))
    state, batch = stage.init(), next(stage.data())
    batch = jax.tree.map(lambda x: jax.device_put(x, stage.batch_sharding), batch)
    assert stage.compile(state, batch) == 2
    widened = {
        name: jnp.resize(x, (x.shape[0], 80)) if x.ndim == 2 and x.shape[1] == 64 else x
        for name, x in batch.items()
    }
    assert {batch["ids"].shape[1], widened["ids"].shape[1]} == {64, 80}
    for rows in (batch, widened):
        rows = jax.tree.map(lambda x: jax.device_put(x, stage.batch_sharding), rows)
        state, _ = stage.step(state, rows)
        assert stage.operations_of(rows) > 0
    assert stage.operations_of(widened) > 1.1 * stage.operations_of(batch) or encode == "step"
    assert stage.program.compiled._cache_size() == 0  # nothing was compiled by the way


@pytest.mark.slow
def test_rows_may_be_shared_from_some_step_on(trained, tokenizer, chats, tmp_path, caplog):
    """Steps 3 and 4 with two conversations in a row; the run is that of rows of their own."""
    run(tiny(tokenizer, chats, total_steps=2), tmp_path / "shared")
    config = tiny(tokenizer, chats, pack=2, **{"data.buckets": (64, 80)})
    state = run(config, tmp_path / "shared")
    assert int(state.step) == 4 and "config.pack: 1 -> 2" in caplog.text
    # The first two steps decayed to a schedule's end of their own: the other run has it, too.
    run(tiny(tokenizer, chats, total_steps=2), tmp_path / "apart")
    apart = run(tiny(tokenizer, chats), tmp_path / "apart")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), apart.params, state.params
    )


@pytest.mark.slow
def test_pictures_in_the_step_train_the_same(trained, tokenizer, chats, tmp_path):
    """Features from a table or tokenized in the step; a broken picture is left out of both."""
    state = run(tiny(tokenizer, chats, **{"data.encode": "step"}), tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), trained[1].params, state.params
    )


@pytest.mark.slow
def test_starts(trained, tokenizer, chats, tmp_path):
    """From a run, from a folder with the released layout, from a language model alone."""
    workdir, state = trained
    config = tiny(tokenizer, chats, init_from=workdir)
    fresh, text = make(config).warm_start(make(config).init())
    jax.tree.map(np.testing.assert_array_equal, fresh.params, state.params)
    assert "raw weights" in text
    stage = make(tiny(tokenizer, chats, init_from=str(tmp_path / "folder")))
    model = tfx.Assistant.load(workdir)
    save_understanding_model(tmp_path / "folder", model.config, state.params)
    fresh, _ = stage.warm_start(stage.init())
    jax.tree.map(np.testing.assert_array_equal, fresh.params, state.params)

    lm = LMConfig(vocabulary_size=259, **LM)
    shapes = language_model_template(lm)
    words = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    save_language_model(tmp_path / "lm", lm, words)
    stage = make(tiny(tokenizer, chats, init_from=str(tmp_path / "lm")))
    start = stage.init()
    assert all(np.isnan(x).all() for x in jax.tree.leaves(start.params["lm"]))
    projector = make(tiny(tokenizer, chats)).init().params["projector"]
    jax.tree.map(np.testing.assert_array_equal, start.params["projector"], projector)
    fresh, text = stage.warm_start(start)
    assert "the projector from scratch" in text
    assert all((x == 0.5).all() for x in jax.tree.leaves(fresh.params["lm"]))
    jax.tree.map(np.testing.assert_array_equal, fresh.params["projector"], projector)
    narrow = tiny(tokenizer, chats, init_from=str(tmp_path / "lm"))
    narrow.model.lm.update(width=8, mlp_width=12)
    stage = make(narrow)
    with pytest.raises(ValueError, match=r"(?s)width is 16 there, 8 here.*mlp_width"):
        stage.warm_start(stage.init())


def test_adapters_start_from_a_run_and_resume(trained, tokenizer, chats, tmp_path):
    """Stopped after two of four steps, the run goes on bit for bit; it is loaded merged."""
    workdir, base = trained
    options = {"lora.rank": 2, "lora.alpha": 1.0, "lora.weights": "nf4"}
    with pytest.raises(ValueError, match=r"lora\.rank=2 adapts a trained model"):
        make(tiny(tokenizer, chats, **options)).init()
    options["init_from"] = workdir
    whole = run(tiny(tokenizer, chats, **options), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    again = run(tiny(tokenizer, chats, **options), tmp_path / "again")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(CheckpointError, match=r"config\.lora\.rank: 2 -> 3"):
        run(tiny(tokenizer, chats, **{**options, "lora.rank": 3}), tmp_path / "again")

    loaded = tfx.Assistant.load(tmp_path / "whole")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(base.params)
    kernel = loaded.params["lm"]["blocks"]["mlp"]["up"]["kernel"]
    old = base.params["lm"]["blocks"]["mlp"]["up"]["kernel"]
    assert 0 < np.abs(kernel - old).max() < 0.2 * np.abs(old).max()
    loaded.save_pretrained(tmp_path / "saved")
    assert convert.run(
        [f"--src={tmp_path / 'whole'}", f"--dst={tmp_path / 'plain'}", "--to=orbax",
         "--part=understanding"]
    ) == 0  # fmt: skip
    for name in ("saved", "plain"):
        other = tfx.Assistant.load(tmp_path / name, tokenizer=tokenizer).params
        jax.tree.map(np.testing.assert_array_equal, other, loaded.params)
    # The whole first run is the base of adapters, and of those on adapters.
    stage = make(tiny(tokenizer, chats, **{**options, "init_from": str(tmp_path / "whole")}))
    fresh, _ = stage.warm_start(stage.init())
    projector = fresh.params["projector"]
    jax.tree.map(np.testing.assert_array_equal, projector, whole.params["projector"])


@pytest.mark.slow
def test_another_tokenizer_is_refused(trained, chats, tmp_path):
    workdir, _ = trained
    other = str(tiny_config.write_tokenizer(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="codes mean something else"):
        tfx.Assistant.load(workdir, tokenizer=other)
    config = tiny(other, chats)
    with pytest.raises(CheckpointError, match="tokenizer"):
        run(config, workdir)


def test_everything_that_a_config_lacks_is_reported_together(tokenizer, chats):
    config = tiny("", "", text_tokenizer="")
    with pytest.raises(ValueError) as error:
        make(config)
    for part in ("tokenizer.path", "text_tokenizer", "data.path"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"data\.encode 'never'"):
        make(tiny(tokenizer, chats, **{"data.encode": "never"}))
    with pytest.raises(ValueError, match="vision_channels is 7"):
        make(tiny(tokenizer, chats, **{"model.vision_channels": 7}))


@pytest.fixture(scope="module")
def assistant(trained):
    return tfx.Assistant.load(trained[0])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "x.png"
    pixels = np.random.default_rng(3).integers(0, 256, (24, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_answers(assistant, picture):
    """One, several at once with and without picture, and the same piece by piece."""
    one = assistant.answer("What?", picture, max_new=8)
    pixels = np.asarray(Image.open(picture))
    several = assistant.answer(
        ["What?", "Who are you?", "What?"], [pixels, None, Image.open(picture)], max_new=8
    )
    assert several[0] == several[2] == one and isinstance(several[1], str)
    assert "".join(assistant.chat().stream("What?", picture, max_new=8)).strip() == one
    drawn = {assistant.answer("What?", max_new=8, temperature=2.0, seed=s) for s in range(4)}
    assert len(drawn) > 1


@pytest.mark.slow
def test_answers_over_several_devices(trained, assistant, picture):
    """Loading spreads the model over all of them; it says the same."""
    result = several_devices_program.run("assistant", trained[0], picture)
    several = assistant.answer(["What?", "Who?"], [picture, None], max_new=8)
    assert result == {"split": True, "found": [*several, several[0]]}


def test_a_saved_assistant_answers_alike(assistant, picture, tmp_path, monkeypatch):
    """From the folder alone, which also holds the tokenizers and how pictures are prepared."""
    assistant.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir("/")
    loaded = tfx.Assistant.from_pretrained(tmp_path / "mine")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, assistant.params)
    for name in ("config", "template", "image_mode", "max_length"):
        assert getattr(loaded, name) == getattr(assistant, name)
    wanted = assistant.answer("What?", picture, max_new=8)
    assert loaded.answer("What?", picture, max_new=8) == wanted
    assert loaded.answer("What?", picture.read_bytes(), max_new=8) == wanted
    assert len(repr(loaded).splitlines()) <= 3
    with pytest.raises(ValueError, match="a picture of dtype float64: give uint8"):
        loaded.answer("What?", np.zeros((16, 16, 3)))


def test_likelihood(assistant, picture):
    """Of several rows at once as of one; higher for what training has labels for than for noise."""
    rows = [("What?", picture, "n7"), ("What?", None, "zzzzzzzz")]
    found = assistant.likelihood(*zip(*rows, strict=True))
    assert found[0][0] > found[1][0] and all(value < 0 for value, _ in found)
    alone = assistant.likelihood(*zip(*rows[:1], strict=True))
    np.testing.assert_allclose(alone[0][0], found[0][0], rtol=1e-4)
    marked = assistant.likelihood(["What?"], [picture], ["n7<image>"])  # stands for no picture
    assert marked == alone


def test_a_conversation_remembers(assistant, picture):
    chat = assistant.chat()
    first = chat.ask("What?", picture, max_new=4)
    assert [role for role, _ in chat.turns] == ["human", "gpt"] and len(chat.pictures) == 1
    chat.ask("And this?", picture, max_new=4)
    assert len(chat.pictures) == 2 and chat.turns[1] == ("gpt", first)
    prompt = assistant._prompt([chat.turns[:3]], [chat.pictures], 4)
    assert (prompt["places"] >= 0).sum() == 2 * assistant.vectors


def test_questions_that_cannot_be_asked(assistant, tmp_path):
    for call, message in (
        (lambda: assistant.answer("", None), "empty"),
        (lambda: assistant.answer("x" * 3000), "there is room for"),
        (lambda: assistant.answer("x", tmp_path / "no.png"), "picture"),
        (lambda: assistant.answer(["x"], ["a", "b"]), "one for each"),
        (lambda: assistant.answer("x", np.zeros((4, 4))), "give uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_command(trained, picture, capsys, monkeypatch):
    flags = [f"--checkpoint={trained[0]}", "--max_new=6"]
    assert answer.run([*flags, f"--image={picture}", "--question=What?"]) == 0
    said, told = capsys.readouterr()
    assert said.endswith("\n") and said.count("\n") == 1
    assert told.startswith(f"loading {trained[0]} and compiling ... (usually 20 s")
    two = ["--question=What?", "--question=Who?"]
    assert answer.run([*flags, f"--image={picture}", *two]) == 0
    assert re.fullmatch(rf"> What\?\n{re.escape(said)}> Who\?\n.*\n", capsys.readouterr().out)
    lines = f"Hello?\n/image {picture}\nWhat?\n/image nowhere.png\nWhat?\n/new\nWho?\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert answer.run([*flags, "--chat"]) == 0
    out = capsys.readouterr().out
    assert out.count("> ") == 8 and "nowhere.png" in out
    assert answer.run([f"--checkpoint={trained[0]}/none", "--question=x"]) == 2
    assert "answer:" in capsys.readouterr().err


def test_commands_of_the_chat(trained, picture, capsys, monkeypatch, tmp_path):
    seen = []

    def stream(chat, question, image, **how):
        seen.append((question, image is not None, len(chat.turns)))
        pieces = real(chat, question, image, **how)
        yield next(pieces, "")
        if question == "Stop!":
            raise KeyboardInterrupt
        yield from pieces

    real = Chat.stream
    monkeypatch.setattr(Chat, "stream", stream)
    lines = f"/help|/nonsense|/draw a cat|/image {picture}|/image none.png|Q1|Stop!|Q2|/reset|Q3||"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines.replace("|", "\n")))
    flags = [f"--checkpoint={trained[0]}", f"--out={tmp_path / 'drawn'}"]
    assert answer.run([*flags, "--chat", "--max_new=6"]) == 0
    banner, *said = map(str.strip, capsys.readouterr().out.split("> "))
    assert banner.startswith("Assistant ") and "/help" in banner
    assert all(word in said[0] for word in ("/image PATH", "/draw", "/reset", "/help", "Ctrl-C"))
    assert said[1] == "there is no command /nonsense; /help lists them"
    assert "this model only reads: /draw needs a unified model" in said[2]
    assert said[3] == "" and "none.png" in said[4] and said[6].endswith("(stopped)")
    assert "(stopped)" not in said[5] + said[7]
    assert seen == [("Q1", True, 0), ("Stop!", False, 2), ("Q2", False, 2), ("Q3", False, 0)]
    assert not (tmp_path / "drawn").exists()


def test_a_picture_that_is_none_is_known_before_the_model_is_loaded(capsys):
    assert answer.run(["--checkpoint=nowhere", "--image=none.png", "--question=x"]) == 2
    error = capsys.readouterr().err
    assert "none.png" in error and "nowhere" not in error and error.count("\n") == 1


def test_control_c_ends_a_chat_quietly(trained, request):
    # A suite in the background of a shell ignores it, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    command = [sys.executable, "-m", "tokenflow_jax.answer", f"--checkpoint={trained[0]}", "--chat"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = ""
    while not out.endswith("\n> "):
        piece = process.stdout.read(1)
        assert piece, process.stderr.read()
        out += piece
    for seconds in (4, 20, 20):  # one between the prompt and the read is noticed with the next
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    assert process.wait(60) == 130  # before its input ends, which would end it, too
    rest, error = process.communicate()
    assert rest == "\n"
    assert error.splitlines()[1:] == ["answer: interrupted"]


@pytest.mark.slow
def test_a_converted_model_answers_alike(trained, assistant, picture, tokenizer, tmp_path, capsys):
    """Through the released layout; what config.json cannot tell has to be said."""
    from tokenflow_jax import convert as command

    folder = tmp_path / "released"
    run = ["--part=understanding", f"--src={trained[0]}", f"--dst={folder}", "--to=torch"]
    assert command.run(run) == 0
    with pytest.raises(ValueError, match="where the image tokenizer is"):
        tfx.Assistant.load(folder)
    other = tfx.Assistant.load(
        folder, tokenizer=tokenizer, text_tokenizer="bytes", template="vicuna_v1", system="",
        image_mode="square",
    )  # fmt: skip
    wanted = assistant.answer("What?", picture, max_new=8)
    assert other.answer("What?", picture, max_new=8) == wanted

    # Back into our format, with the tokenizer noted: it need not be named any more.
    ours, foreign = tmp_path / "ours", tiny_config.write_tokenizer(tmp_path / "foreign", seed=1)
    back = ["--part=understanding", f"--src={folder}", f"--dst={ours}", "--to=orbax"]
    capsys.readouterr()
    assert command.run([*back, f"--tokenizer={foreign}"]) == 2
    assert "its codes mean something else" in capsys.readouterr().err and not ours.exists()
    assert command.run([*back, f"--tokenizer={tokenizer}"]) == 0
    known = {"template": "vicuna_v1", "system": "", "image_mode": "square"}
    other = tfx.Assistant.load(ours, text_tokenizer="bytes", **known)
    assert other.answer("What?", picture, max_new=8) == wanted
    capsys.readouterr()
    flags = [
        f"--checkpoint={folder}", f"--tokenizer={tokenizer}", "--text_tokenizer=bytes",
        "--template=vicuna_v1", "--system=", "--image_mode=square", "--max_new=8",
    ]  # fmt: skip
    assert answer.run([*flags, f"--image={picture}", "--question=What?"]) == 0
    assert capsys.readouterr().out == f"{printable(wanted)}\n"


def test_a_mixture_trains_on_all_its_sources(tokenizer, chats, tmp_path):
    lines = ("1 emoji questions=kind as=kinds", f"3 jsonl '{chats}' as=chats")
    changes = {"data.name": "mixture", "data.mixture": lines, "data.encode": "step"}
    config = tiny(tokenizer, chats, **changes)
    whole = loop.train_and_evaluate(config, tmp_path / "a", make(config)).state
    shutil.copytree(tmp_path / "a" / "checkpoints" / "2", tmp_path / "b" / "checkpoints" / "2")
    again = loop.train_and_evaluate(config, tmp_path / "b", make(config)).state
    same = jax.tree.map(np.array_equal, whole.params, again.params)
    assert all(jax.tree.leaves(same))
    history = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    found = {k: v for line in history for k, v in line.items()}
    kinds, others = found["source/kinds/loss"], found["source/chats/loss"]
    assert min(kinds, others) < found["loss/total"] < max(kinds, others)
    config.data.encode, config.pack = "once", 2
    config.data.buckets = ()
    loop.train_and_evaluate(config, tmp_path / "c", make(config))
    assert "source/kinds/loss" in (tmp_path / "c" / "metrics.jsonl").read_text()
    config.data.order = "grouped"
    with pytest.raises(ValueError, match=r"data\.order of a mixture"):
        make(config)
