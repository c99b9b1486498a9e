"""A graph in one file: the uniform one at twice its rates."""

import dataclasses
from typing import ClassVar

from sedd_jax.diffusion import uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwiceUniform:
    """Q = 2/N - 2 identity: everything is that of the uniform graph after twice the noise."""

    meaning: ClassVar[str] = "tokens turn into any token at twice the rate"
    has_mask: ClassVar[bool] = False
    has_cross_entropy: ClassVar[bool] = False
    scales_by_sigma: ClassVar[bool] = False
    mixes_uniformly: ClassVar[bool] = False

    vocab_size: int

    @classmethod
    def from_tokenizer(cls, vocab_size, mask_id):
        return cls(vocab_size=vocab_size if mask_id is None else vocab_size + 1)

    @property
    def _own(self):
        return uniform.Uniform(vocab_size=self.vocab_size)

    @property
    def num_states(self):
        return self.vocab_size

    @property
    def mask_id(self):
        return None

    def sample_transition(self, key, x0, sigma, *, paired=False):
        return self._own.sample_transition(key, x0, 2 * sigma, paired=paired)

    def sample_limit(self, key, shape):
        return self._own.sample_limit(key, shape)

    def is_noise(self, xt):
        return self._own.is_noise(xt)

    def reverse_rate(self, xt):
        return 2 * self._own.reverse_rate(xt)

    def leap_time(self, sigma):
        return sigma

    def sigma_at(self, leap_time):
        return leap_time

    def leap_rate(self, xt, sigma):
        return self.reverse_rate(xt)

    def tweedie_jump(self, total, xt, delta_sigma):
        return self._own.tweedie_jump(total, xt, 2 * delta_sigma)

    def denoise_jump(self, total, xt, sigma):
        return self._own.denoise_jump(total, xt, 2 * sigma)

    def score_entropy(self, summary, sigma, xt, x0):
        return 2 * self._own.score_entropy(summary, 2 * sigma, xt, x0)

    def cross_entropy(self, summary, sigma, xt, x0):
        return self.score_entropy(summary, sigma, xt, x0)

    def limit_divergence(self, sigma):
        return self._own.limit_divergence(2 * sigma)

    def reconstruction(self, summary, sigma, xt, x0):
        return self._own.reconstruction(summary, 2 * sigma, xt, x0)

    def step_bound(self, summary, sigma, after, xt, x0):
        return self._own.step_bound(summary, 2 * sigma, 2 * after, xt, x0)
