"""What the kernels' README shows works as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

README = Path(__file__).parents[2] / "kernels" / "jattrib_kernels" / "README.md"


def test_the_snippet_scores_rows_by_their_kernel():
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    gradients = np.random.default_rng(0).standard_normal((300, 3000)).astype(np.float32)
    names = {"gradients": jnp.asarray(gradients)}
    exec(snippet, names)
    np.testing.assert_allclose(names["left"] + names["right"], names["features"], rtol=1e-4, atol=1e-4)
    features = np.asarray(names["features"], np.float64)
    kernel = features.T @ features / 300
    damped = kernel + 0.1 * np.trace(kernel) / 256 * np.eye(256)
    np.testing.assert_allclose(names["scores"], features @ np.linalg.solve(damped, features[:3].T), rtol=0, atol=2e-3)
    assert names["info"].positive_definite
    np.testing.assert_array_equal(np.argmax(names["scores"], axis=0), [0, 1, 2])
