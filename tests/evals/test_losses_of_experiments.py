"""Laws of `experiments.figure`: what an arm is, what its seeds are, and their mean."""

from types import SimpleNamespace

import pytest

from experiments.figure import draw, read, table


def record(title, nll, model="", seed=0):
    # 3 tokens at the loss, 1 at twice the loss: the table weighs them.
    points = [[0, 3, nll, 3, 0, 0], [3, 4, 2 * nll, 1, 0, 0]]
    segments = [[0, 4, 1.25 * nll, 4, 0, 0]]
    told = dict(task="perplexity", title=title, length=4, seed=seed)
    told |= {"curve": points * 2, "segments": segments}
    return told | ({"model": model} if model else {})


def stage(title, *records):
    return SimpleNamespace(
        stage=SimpleNamespace(title=title), named=lambda: list(records)
    )


def test_models_are_seeds_of_their_arm_and_documents_are_averaged():
    mine = [record("full", nll, f"mamba {s}", seed=d)
            for s, losses in enumerate(((1.0, 3.0), (4.0, 4.0)))
            for d, nll in enumerate(losses)]  # fmt: skip
    (line,) = table(read([stage("Reading", *mine)], "segments"))
    assert line[:5] == ("mamba", 4, 0, 4, 2)
    assert line[5] == pytest.approx(1.25 * 3.0)  # seeds 2 and 4


def test_texts_are_seeds_where_one_model_reads_several():
    texts = [stage(t, record("window", n), record("4 sinks", n - 1))
             for t, n in (("Emma", 3.0), ("Persuasion", 5.0))]  # fmt: skip
    lines = {line[0]: line for line in table(read(texts, "segments"))}
    assert lines["window"][4:6] == (2, pytest.approx(5.0))
    assert lines["4 sinks"][5] == pytest.approx(3.75)


def test_a_band_is_drawn_for_trained_seeds_and_not_for_texts():
    trained = [record("full", 1.0 + s, f"mamba {s}") for s in range(2)]
    for stages, bands in (
        ([stage("Reading", *trained)], 1),
        ([stage(t, record("full", 2.0)) for t in ("a", "b")], 0),
    ):
        (axes,) = draw(read(stages, "curve"), "title").axes
        assert len(axes.collections) == bands
