"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), the same under every engine."""

from dataclasses import dataclass

_GROWTH_INTERVAL = 2000  # finite steps in a row
_LARGEST = 2.0**24


@dataclass
class LossScale:
    """The factor that lifts small gradients into fp16's range; 1 and constant in the other precisions."""

    dynamic: bool
    value: float = 1.0
    good_steps: int = 0
    """Finite steps since the factor last changed."""

    def update(self, finite: bool) -> None:
        """Halve after a step that overflowed; double after 2,000 finite steps in a row."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == _GROWTH_INTERVAL:
            self.value, self.good_steps = min(_LARGEST, self.value * 2), 0


def loss_scale(precision: str) -> LossScale:
    """The scale at the first step: 2^16 in fp16, as in the scalers of PyTorch and DeepSpeed."""
    return LossScale(True, 2.0**16) if precision == "fp16" else LossScale(False)
