"""What a linear model reads off a node's own features, without the graph."""

from __future__ import annotations

import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from .data import MultiTaskGraph

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)


def own_features(graph: MultiTaskGraph) -> dict[str, float]:
    """Test metric of logistic or ridge regression on a node's own features, by task name.

    The regularisation is the one of five strengths with the best validation metric.
    """
    x = graph.data.x.cpu()
    if x.is_sparse:
        features = scipy.sparse.coo_matrix((x.values().numpy(), x.indices().numpy()), shape=tuple(x.shape)).tocsr()
    else:
        features = x.numpy()
    masks = (graph.data.train_mask, graph.data.val_mask, graph.data.test_mask)
    train, val, test = (mask.cpu().numpy() for mask in masks)
    scores = {}
    for name, task in graph.tasks.items():
        y = task.y.numpy()
        best = -float("inf")
        for strength in STRENGTHS:
            if task.kind == "regression":
                model = Ridge(alpha=strength).fit(features[train], y[train])
                predict = model.predict
            else:
                model = LogisticRegression(C=strength, max_iter=5000).fit(features[train], y[train])
                predict = model.decision_function
            out = [torch.from_numpy(predict(features[part])) for part in (val, test)]
            # decision_function and predict give [n] for one output; the metrics take [n, C].
            out = [o if o.dim() == 2 else o[:, None] for o in out]
            score = task.spec.metric(out[0], task.y[torch.from_numpy(val)])
            if score > best:
                best, scores[name] = score, task.spec.metric(out[1], task.y[torch.from_numpy(test)])
    return scores
