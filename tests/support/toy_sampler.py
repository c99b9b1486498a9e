"""A sampler in one file: each step is two Tweedie steps of half its length."""

import jax

from sedd_jax.reverse import steps

_tweedie = steps.one_evaluation(steps.tweedie)


def _step(key, draws, process, given, xt, t, dt):
    key_first, key_second = jax.random.split(key)
    middle = _tweedie(key_first, draws, process, given, xt, t, dt / 2)
    return _tweedie(key_second, draws, process, given, middle, t - dt / 2, dt / 2)


SAMPLER = steps.TimeStepping(traits=steps.Traits(meaning="two halves of a step", evaluations=2), step_fn=_step)
