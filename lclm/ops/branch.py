"""Several forms of one function, chosen while it runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lclm.typing import Array, Int

Form = Callable[[Any, Any], Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def choose(
    forms: tuple[Form, ...], index: Int[Array, ""], values: Any, fixed: Any
) -> Any:
    """`forms[index](values, fixed)`; differentiable in `values`, not in `fixed`.

    The backward pass keeps the arguments alone and runs the chosen form again, so that
    memory is that of one form: a plain `lax.switch` saves what every form would need.
    """
    return lax.switch(index, forms, values, fixed)


def _forward(forms, index, values, fixed):
    return choose(forms, index, values, fixed), (index, values, fixed)


def _backward(forms, saved, cotangent):
    index, values, fixed = saved

    def pull(form: Form):
        def run(values, fixed, cotangent):
            _, back = jax.vjp(lambda v: form(v, fixed), values)
            return back(cotangent)[0]

        return run

    pulls = [pull(form) for form in forms]
    return None, lax.switch(index, pulls, values, fixed, cotangent), None


choose.defvjp(_forward, _backward)
