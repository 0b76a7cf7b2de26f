"""The unified model's API: it answers, draws, and talks about what it drew, with one cache."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
import tiny as tiny_config
from picture_files import picture
from unified.test_stage import make, tiny

import tokenflow_jax as tfx
from tokenflow_jax import answer, sample
from tokenflow_jax.data.chat.templates import DRAWN, GPT, HUMAN, IMAGE
from tokenflow_jax.train import loop
from tokenflow_jax.understanding.answer import Decoding


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    config = tiny(str(tiny_config.write_tokenizer(folder / "tokenizer")))
    config.eval.update(max_new=0, retrieval=0, prompts=())
    loop.train_and_evaluate(config, folder / "run", make(config))
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir):
    return tfx.Unified.load(workdir)


@pytest.fixture(scope="module", params=[{}, {"rope": "3d", "scale_inputs": "residual"}])
def either(model, request):
    """The model, and one with the same weights and other options."""
    config = dataclasses.replace(model.config, **request.param)
    return dataclasses.replace(model, config=config, model=None)


def read_tokens(session):
    """Count the tokens that a session reads from now on."""
    counts, read = [], session._prompt

    def counted(new, pictures):
        counts.append(new.shape[1])
        return read(new, pictures)

    session._prompt = counted
    return counts


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_first_picture_of_a_chat_is_that_of_generate(either, guidance):
    chat = either.chat()
    drawn = chat.draw("red apple", seed=3, guidance=guidance)
    alone = either.generate("red apple", seed=3, guidance=guidance, negative_prompt="")
    np.testing.assert_array_equal(chat.pictures[0].codes_N, alone.codes[0])
    np.testing.assert_array_equal(np.asarray(drawn), alone.images[0])


def test_a_chat_reads_each_token_once(either):
    """Answers are those of a chat that reads everything anew; a turn costs its own tokens."""
    model = either
    chat, options = model.chat(), {"max_new": 5}
    counts = read_tokens(chat._session)
    chat.ask("What is this?", picture(16, 16, 1), **options)
    chat.draw("red apple", seed=1, guidance=2.0, history=True)
    chat.draw("dog", seed=2, guidance=2.0, history=True)
    second = chat.ask("Which one?", **options)
    third = chat.ask("Why?", picture(16, 16, 2), **options)
    row = model._row([*chat.turns[:-1]], 5)
    written = 2 * (model.config.pyramid.tokens - 1)  # by drawing
    # What was drawn or answered is in the cache but for its last token; a request is read with the
    # place of its first code.
    assert sum(counts) <= len(row["ids"]) - written + 2 + 5
    again = model.chat()
    again.turns, again.pictures = chat.turns[:6], chat.pictures[:3]
    fresh = read_tokens(again._session)
    assert again.ask("Which one?", **options) == second
    assert again.ask("Why?", chat.pictures[-1], **options) == third
    length = len(model._row(chat.turns[:-1], 5)["ids"])
    kept = [np.asarray(c._session._kept.keys)[:, :, :length] for c in (chat, again)]
    np.testing.assert_allclose(*kept, atol=1e-4)
    assert fresh[0] > sum(counts[1:4])  # nothing was known
    assert [turn for turn in chat.turns if turn[0] == GPT][1:3] == [(GPT, DRAWN + IMAGE)] * 2


def test_a_chat_without_history_draws_from_the_request_alone(model):
    """What is drawn then is part of the conversation, and an answer that it overtakes says so."""
    first = model.chat().draw("red apple", seed=3)
    chat = model.chat()
    chat.ask("What is this?", picture(16, 16, 1), max_new=4)
    with_history = model.draw_next(
        [*chat.turns, (HUMAN, "red apple"), (GPT, DRAWN)], chat.pictures,
        dataclasses.replace(model.recipe, seed=3), model.session(),
    )  # fmt: skip
    drawn = chat.draw("red apple", seed=3, history=False)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(first))
    assert (np.asarray(drawn) != with_history.image_HWC).any()
    again = model.chat()
    again.turns, again.pictures = chat.turns, chat.pictures
    overtaken = chat.stream("Which one?", max_new=4)
    assert next(overtaken) is not None
    chat.draw("dog", history=False)
    with pytest.raises(ValueError, match="went on before this answer"):
        list(overtaken)
    assert chat.turns[:-2] == again.turns
    chat.turns, chat.pictures = again.turns, again.pictures
    assert chat.ask("Which one?", max_new=4) == again.ask("Which one?", max_new=4)


def test_another_drawn_picture_is_read_anew(model):
    chat = model.chat()
    chat.draw("red apple", seed=1)
    said = chat.ask("What?", max_new=4)
    other = model.chat()
    other.draw("red apple", seed=2)
    chat.turns, chat.pictures = chat.turns[:2], other.pictures
    fresh = model.chat()
    fresh.turns, fresh.pictures = chat.turns, chat.pictures
    counts = read_tokens(chat._session)
    assert chat.ask("What?", max_new=4) == fresh.ask("What?", max_new=4)
    assert counts[0] > model.config.pyramid.tokens and isinstance(said, str)


def test_a_picture_drawn_another_time_is_read_anew(model):
    chats = [model.chat(), model.chat()]
    for seed, chat in enumerate(chats):
        chat.draw("red apple", seed=seed)
    chats[0].pictures = chats[1].pictures
    for chat in chats:
        chat.ask("What?", max_new=1)
    one, two = (np.asarray(chat._session._kept.keys)[:, :, :80] for chat in chats)
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_texts_stand_for_no_picture(model):
    chat = model.chat()
    chat.draw(f"{IMAGE}red {DRAWN}apple", seed=1)
    chat.ask(f"What {DRAWN}is{IMAGE} this?", max_new=2)
    assert [text for role, text in chat.turns if role == HUMAN] == ["red apple", "What is this?"]
    # Also where the model writes a marker.
    ids = model.text_tokenizer.encode(f"a{DRAWN}{IMAGE}", add_special_tokens=False)
    chat._session.tokens = lambda *_: iter([(np.array(ids), True)])
    chat.ask("And this?")
    assert chat.turns[-1] == (GPT, "a")


def test_pictures_that_the_turns_lack_are_an_error(model):
    chat = model.chat()
    chat.draw("red apple", seed=1)
    drawn, chat.pictures = chat.pictures, []
    with pytest.raises(ValueError, match="show 1 pictures, and there are 0"):
        chat.ask("What?", max_new=2)
    chat.pictures = [picture(16, 16, 1)]
    with pytest.raises(ValueError, match="have 1 drawn pictures, and there are 0"):
        chat.ask("What?", max_new=2)
    chat.pictures = drawn
    counts = read_tokens(chat._session)
    assert isinstance(chat.ask("What?", max_new=2), str)
    assert counts[0] < model.config.pyramid.tokens + model.vectors + 40  # the cache was kept


def test_an_answer_that_is_overtaken_says_so(model):
    chat = model.chat()
    overtaken = chat._session.tokens(
        model._row([(HUMAN, "a")], 4), [], model.decoding(4, 0.0, 0, 0.0), 0
    )
    next(overtaken)
    chat.draw("red apple", seed=1)
    with pytest.raises(ValueError, match="went on before this answer"):
        next(overtaken)
    chat.ask("What?", max_new=2)


def test_a_chat_draws_up_to_its_length(model):
    short = dataclasses.replace(model, max_length=128)
    row = short._row([(HUMAN, ""), (GPT, DRAWN)], 0)
    request = "a" * (128 - len(row["ids"]))
    chat = short.chat()
    chat.draw(request, seed=1)
    with pytest.raises(ValueError, match=r"129 tokens long, .* room for 128"):
        short.chat().draw(request + "a")
    with pytest.raises(ValueError, match="negative_prompt"):
        chat.draw("dog", negative_prompt="blue")


def test_later_tokens_see_the_drawn_picture(model):
    chats = []
    for codes in (0, 1):
        chat = model.chat()
        chat.draw("red apple", seed=1)
        if codes:
            picture = chat.pictures[0]
            chat.pictures = [picture._replace(codes_N=(picture.codes_N + 5) % 32)]
        turns = [*chat.turns, (HUMAN, "What?")]
        row = model._row(turns, 4)
        prompt, count = model.session()._prompt(
            np.stack([row["ids"], row["places"]]), chat.pictures
        )
        state = model._compiled["read"](
            model.params, prompt, None, np.int32(0), np.int32(count), jax.random.key(0),
            decoding=Decoding(4), room=256,
        )  # fmt: skip
        chats.append(np.asarray(state.logits_BV))
    assert np.abs(chats[0] - chats[1]).max() > 1e-6


def test_saved_models_draw_and_answer_the_same(either, tmp_path):
    either.save_pretrained(tmp_path / "saved")
    loaded = tfx.Unified.from_pretrained(tmp_path / "saved")
    assert loaded.config == either.config
    one, two = (m.generate("dog", seed=1).codes for m in (either, loaded))
    np.testing.assert_array_equal(one, two)
    asked = ("What is this?", picture(16, 16, 1))
    assert either.answer(*asked, max_new=5) == loaded.answer(*asked, max_new=5)


def test_commands_take_a_unified_model(model, workdir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = [f"--checkpoint={workdir}", "--prompt=red apple", f"--out={out}", "--seed=4"]
    assert sample.run(options) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00000_red-apple.png", "recipe.json"]
    lines = iter(["/draw red apple\n", "What is this?\n", "/draw\n", "\n"])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines), raising=False)
    command = [f"--checkpoint={workdir}", "--chat", "--max_new=4", f"--out={tmp_path / 'chat'}"]
    assert answer.run(command) == 0
    names = sorted(path.name for path in (tmp_path / "chat").iterdir())
    assert names == ["drawn_000.png", "drawn_001.png"]
    assert str(tmp_path / "chat" / "drawn_000.png") in capsys.readouterr().out
    lines = iter(["/draw red apple\n", "What is this?\n", "\n"])
    command[-1] = f"--out={tmp_path / 'chat' / 'drawn_000.png'}"  # no folder
    assert answer.run(command) == 0 and "drawn_000.png" in capsys.readouterr().out
