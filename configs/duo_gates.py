"""DuoAttention (arXiv 2410.10819): which kv heads need the whole text.

lclm train --config=configs/duo_gates.py:model=FOLDER     (8 A100, hours, in the paper)
lclm train --config=configs/duo_gates.py:size=cpu         (SmolLM2, minutes)

The model is frozen; one gate a kv head is trained on passkeys hidden in a book. The
result is extra.safetensors beside the model. Numbers: not measured yet.
"""

import ml_collections

PASSKEYS = "passkeys:book=novels,keys=10,words=32"


def get_config(size="full", model="", data="", length=0):
    """Rows of `length` tokens; the paper draws 1000 to 32000."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "duo-gates"
    config.title = "DuoAttention gates"
    config.length = length or (1024 if small else 32768)
    config.model = dict(source=model or ("smollm2-135m" if small else "llama-3-8b"))
    sizes = "sinks=16,window=64" if small else "sinks=128,window=256"
    config.objective = f"duo_gates:{sizes}"
    tiny = "passkeys:book=novels,keys=4,words=8"
    config.data = dict(source=data or (tiny if small else PASSKEYS))
    config.steps = 20 if small else 2000
    config.batch = 1
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    fifth = config.steps // 5
    config.optimizer = dict(
        lr=0.02,
        schedule="trapezoid",
        warmup=fifth,
        decay=fifth,
        floor=0.1,
        weight_decay=0.0,
        clip_norm=None,
    )
    return config
