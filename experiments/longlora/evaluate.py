"""What SmolLM2-135M reads past its 8k, by rotary positions and by training.

    lclm run --config=experiments/longlora/evaluate.py
    lclm run --config=experiments/longlora/evaluate.py:length=16384,only=NTK

Persuasion, which no training saw, as one text of 32k tokens under full attention; then
a passkey past the trained length. About 90 minutes on 2 CPU cores; any measurement that
is finished is kept when it is interrupted.
"""

import ml_collections


def get_config(
    length=32768,
    novel=True,
    passkey=True,
    adapter="experiments/longlora/adapter",
    only="",
):
    """`length`: tokens of the novel; `adapter`: of a run; `only`: one model."""
    config = ml_collections.ConfigDict()
    config.name = "longlora-eval"
    config.title = "SmolLM2-135M past 8k"
    config.model = "smollm2-135m"
    config.quantize = "int8"
    config.models = [
        dict(name="LongLoRA", adapter=adapter),
        dict(name="YaRN", rope="yarn:factor=4"),
        dict(name="NTK", rope="ntk:factor=4"),
        dict(name="PI", rope="linear:factor=4"),
        dict(name="as trained"),
    ]
    config.models = [m for m in config.models if only in ("", m["name"])]
    config.stages = []
    if novel:
        config.stages += [
            dict(
                eval="perplexity",
                source="austen:novel=persuasion",
                length=length,
                splits=[8192, 16384],
                bucket=1024,
            )
        ]
    if passkey:
        config.stages += [
            dict(eval="passkey", lengths=[12288, 16384], depths=[0.25, 0.75])
        ]
    return config
