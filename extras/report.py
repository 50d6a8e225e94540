"""What an answer cost: for the line of figures, and for --json."""

from dataclasses import dataclass
from functools import partial

from model import Llava


@dataclass
class Report:
    """What --json prints, behind the model and the settings."""

    answer: str
    visual_tokens: int
    virtual_tokens: int
    tokens_per_layer: list[int]  # visual tokens after the merge of each encoder layer
    encoder_s: float
    prefill_s: float
    decode_tokens_per_s: float
    cache_bytes: int
    device: str
    dtype: str

    def __str__(self):
        return (
            f"visual tokens {self.virtual_tokens} -> {self.visual_tokens} "
            f"({100 * self.visual_tokens / self.virtual_tokens:.0f} %), "
            f"encoder {self.encoder_s:.2f} s, prefill {self.prefill_s:.2f} s, "
            f"{self.decode_tokens_per_s:.1f} tokens/s, cache {self.cache_bytes / 2**20:.3g} MiB"
        )

    def row(self, name: str) -> str:
        counts = f"{self.visual_tokens:4} of {self.virtual_tokens} tokens"
        times = f"encoder {1000 * self.encoder_s:4.0f} ms, prefill {1000 * self.prefill_s:4.0f} ms"
        return f"{name:>6} {counts}, {times}: {' '.join(self.answer.split())}"


def count_tokens(llava: Llava) -> tuple[list[int], list]:
    """Counts the tokens that leave each encoder layer -> the counts, and hooks to remove"""
    c = llava.config
    first = int(c.vision_config.class_token and c.vision_feature_select_strategy == "default")
    layers = llava.vision_tower.layers
    counts = [0] * len(layers)

    def count(i, fc2, args, out):
        counts[i] += len(out) - first

    hooks = [layer.fc2.register_forward_hook(partial(count, i)) for i, layer in enumerate(layers)]
    return counts, hooks
