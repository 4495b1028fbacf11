"""Releases of the compiler that compute wrong numbers without a word.

Some faults of a compiler are not found by looking at results: the derivative of layer normalisation, pulled back for
many queries at once, was right for the first of them and wrong for the others.  The project does not install such a
release; who has it from elsewhere is told.
"""

import warnings

UNSOUND = {
    "0.10.2": "on CPUs it sums products with a broadcast factor wrongly, so that derivatives of softmax and of "
    "normalisation for several queries at once, and row-wise products of large arrays, are silently false",
}
"""What is wrong with a release of jaxlib (https://github.com/jax-ml/jax/issues/39103)."""


class UnsoundCompilerWarning(UserWarning):
    """The installed release of jaxlib is known to compute wrong numbers."""


def warn_if_unsound(release: str) -> None:
    """Warn of a release of jaxlib that is not to be trusted.

    Args:
        release: as in `jaxlib.__version__`.

    Warns:
        UnsoundCompilerWarning: what is wrong with it, and what to install instead.
    """
    if release in UNSOUND:
        warnings.warn(
            f"jaxlib {release} is installed: {UNSOUND[release]}; install another: "
            f"pip install 'jax>=0.10,!={release}' 'jaxlib!={release}'",
            UnsoundCompilerWarning,
            stacklevel=3,
        )
