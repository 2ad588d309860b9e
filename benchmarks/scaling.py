"""`python -m benchmarks.scaling`: what a step of cut cross-entropy costs a device, by formulas, for many devices.

G devices with b tokens each form groups of T that share the V classes: each device has V / T rows of the weight and
meets the b T tokens of its group, and the G / T groups are data parallel. T = 1 is rows alone, T = G classes alone.

| a device and a step | |
|---|---|
| FLOP | `8 b V D`, whatever T is: 2 forward, 6 backward with every tile formed again |
| weight, gradient, Adam's state | `16 V D / T` bytes: 2 + 2 in bfloat16, 12 in float32 |
| hidden states gathered and their gradient scattered | sends `2 (T - 1) / T` of `b T D` numbers |
| statistics gathered | sends `T - 1` times 2 numbers a token of the group, and 32 bytes |
| gradient of its rows all-reduced over the groups | sends `2 (G/T - 1) / (G/T)` of `V D / T` numbers |

Sent in all, about `4 b T D + 4 V D / T` bytes, is least at `T = sqrt(V / b)`.
"""

from dataclasses import dataclass

from benchmarks.report import markdown_table

VOCABULARIES = (256_000, 1_000_000, 10_000_000)
DEVICES = (8, 64, 1024)
WIDTH, TOKENS = 4096, 4096  # D, and b
HALF, SINGLE = 2, 4  # bytes of a number
ADAM = 2 * HALF + 3 * SINGLE  # of a parameter: weight, gradient, master copy and two moments
BATCH = 32  # bytes that tell one batch from another


def own_statistics(tokens: int, numbers: int = 2) -> int:
    """Bytes that a process puts into the one gather of the forward. numbers: statistics a token"""
    return BATCH + SINGLE * numbers * tokens


def hidden_gradient(tokens: int, width: int, itemsize: int = HALF) -> int:
    """Bytes that go into the one reduction of the backward."""
    return itemsize * tokens * width


@dataclass(frozen=True)
class Layout:
    """G devices in groups of T that share V classes, b tokens a device. Results are a device's, in bytes or FLOP."""

    classes: int
    devices: int
    group: int
    width: int = WIDTH
    tokens: int = TOKENS

    @property
    def flop(self) -> float:
        return 8.0 * self.tokens * self.classes * self.width

    @property
    def parameters(self) -> float:
        return ADAM * self.classes * self.width / self.group

    @property
    def statistics_sent(self) -> float:
        return (self.group - 1) * own_statistics(self.tokens * self.group)

    @property
    def hidden_sent(self) -> float:
        return 2 * (self.group - 1) / self.group * hidden_gradient(self.tokens * self.group, self.width)

    @property
    def weight_sent(self) -> float:
        groups = self.devices / self.group
        return 2 * (groups - 1) / groups * HALF * self.classes * self.width / self.group

    @property
    def sent(self) -> float:
        return self.statistics_sent + self.hidden_sent + self.weight_sent


def best_layout(classes: int, devices: int) -> Layout:
    """The one that sends least, of groups of a power of two."""
    groups = (1 << exponent for exponent in range(devices.bit_length()))
    return min((Layout(classes, devices, group) for group in groups if group <= devices), key=lambda each: each.sent)


def scaling_table() -> str:
    """For each V and G: rows alone, the T that sends least, and classes alone."""
    rows = []
    for classes in VOCABULARIES:
        for devices in DEVICES:
            best = best_layout(classes, devices)
            for group in dict.fromkeys((1, best.group, devices)):
                layout = Layout(classes, devices, group)
                rows.append(
                    [
                        f"{classes:,}",
                        f"{devices:,}",
                        f"{group:,}" + (" *" if group == best.group else ""),
                        f"{layout.parameters / 1e9:,.1f}",
                        f"{layout.flop / 1e12:,.0f}",
                        *(
                            f"{sent / 1e9:,.2f}"
                            for sent in (
                                layout.hidden_sent,
                                layout.statistics_sent,
                                layout.weight_sent,
                                layout.sent,
                            )
                        ),
                    ]
                )
    columns = ["V", "G", "T", "parameters GB", "TFLOP", "hidden GB", "statistics GB", "weight GB", "sent GB"]
    return f"D {WIDTH:,}, b {TOKENS:,} tokens a device, bfloat16; * sends least.\n\n" + markdown_table(columns, rows)


if __name__ == "__main__":
    print(scaling_table())
