"""Logistic regression on the residual stream."""

import numpy as np
from jaxtyping import Bool, Float, Shaped


def guesses(
    features: Float[np.ndarray, "prompt d_model"],
    labels: Shaped[np.ndarray, "prompt"],
    fit: Bool[np.ndarray, "prompt"],
    penalty: float,
) -> Shaped[np.ndarray, "prompt"]:
    """Labels that a probe fitted on the rows `fit` gives all rows.

    Features are standardised by the fitted rows; multinomial cross-entropy plus penalty / 2 times the squared
    weights, by L-BFGS. With one label only, everything gets that.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if len(np.unique(labels[fit])) < 2:
        return np.full(len(labels), labels[fit][0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000))
    with threadpool_limits(1):  # several wait for each other longer than such small products take
        return probe.fit(features[fit], labels[fit]).predict(features)
