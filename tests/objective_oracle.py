"""The objectives in float64 from their papers, on the encoders of `smooth_model`.

Each is a function of (weights, given): the trained weights, a tree of complex arrays, and what an
objective has beside them. A gradient is taken by complex steps (`pair_oracle`), so that the real
part of a number is the number without a gradient.

With `ULP` above 0 layers and moments of batch norms are off by that, relatively, up or down: what
float32 does to them at least, and a norm's variance, a difference of moments, to more.
"""

import numpy as np
import pair_oracle
from pair_oracle import unit

ULP = 0.0
stop = np.real


def rounded(x, salt=0):
    """x, or with `ULP` x of another last place; the same for every number of an array's shape."""
    return x * (1 + ULP * np.random.default_rng(salt).choice([-1, 1], x.shape)) if ULP else x


def standardised(x):
    mean, square = rounded(x.mean(0), 1), rounded((x * x).mean(0), 2)
    return (x - mean) / np.sqrt(square - mean * mean + 1e-5)


def normed(w, x):
    """A batch norm; its last one in a head has no shift."""
    return standardised(x) * w["scale"] + w.get("bias", 0)


def images(w, x):
    """[B, S, S, C] -> [B, D]; batch statistics are those of these B."""
    x = rounded((4 * x.reshape(len(x), -1) - 2) @ w["dense"]["kernel"] + w["dense"]["bias"])
    return np.tanh(normed(w["norm"], x) if "norm" in w else x)


def images_of_row(w, views):
    """[B, V, S, S, C] -> [B, V, D], in one pass."""
    b, v, *shape = views.shape
    return images(w, views.reshape(b * v, *shape)).reshape(b, v, -1)


def texts(w, tokens, mask):
    """[B, T] -> [B, D]."""
    words = w["words"][tokens] * mask[..., None]
    return np.tanh(words.sum(1) / mask.sum(1, keepdims=True))


def head(w, x, depth, norms, biases):
    """Dense layers, with a norm after those of `norms` and a shift in those of `biases`."""
    assert set(w) == {f"dense{k}" for k in range(1, depth + 1)} | {f"norm{k}" for k in norms}
    for k in range(1, depth + 1):
        assert ("bias" in w[f"dense{k}"]) == (k in biases)
        x = rounded(x @ w[f"dense{k}"]["kernel"] + w[f"dense{k}"].get("bias", 0), k)
        x = normed(w[f"norm{k}"], x) if k in norms else x
        x = np.where(x.real > 0, x, 0) if k < depth else x
    return x


def probe(w, features, labels):
    """The online probe's softmax: features [B, V, D] without a gradient, one-hot labels [B, L]."""
    logits = stop(features) @ w["probe"]["kernel"] + w["probe"]["bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.mean(np.sum(log_p * labels[:, None], axis=-1))


def simclr(w, given):
    """arXiv 2002.05709, equation 1, summed over both directions; also MICLe's."""
    features = images_of_row(w["backbone"], given["views"])
    b = len(features)
    z = head(w["head"], features.reshape(2 * b, -1), 2, (1, 2), ()).reshape(b, 2, -1)
    loss = 2 * pair_oracle.ntxent(z[:, 0], z[:, 1], 0.1, np.arange(b))
    return loss + probe(w, features, given["labels"])


def followed(w, given, project, predict, loss):
    """BYOL's pattern: `loss(predictions, targets)` of each view's prediction of the other's."""
    total, features, teacher = 0, [], given["teacher"]
    for view in range(2):
        own = images(w["backbone"], given["views"][:, view])
        other = images(teacher["teacher_backbone"], given["views"][:, 1 - view])
        predicted = predict(w["predictor"], project(w["head"], own))
        total += loss(predicted, project(teacher["teacher_head"], other))
        features.append(own)
    return total + probe(w, np.stack(features, 1), given["labels"])


def byol(w, given):
    """arXiv 2006.07733, equation 2 and below."""

    def mlp(w, x):
        return head(w, x, 2, (1,), (1,))

    def distance(p, t):
        return np.mean(np.sum((unit(p) - unit(t)) ** 2, axis=1))

    return followed(w, given, mlp, mlp, distance)


def moco_v3(temperature, layers, last_norm):
    """arXiv 2104.02057, section 3 and algorithm 1."""

    def contrast(q, k):
        rows = np.arange(len(q))
        return 2 * temperature * pair_oracle.infonce(q, k, 1 / temperature, 1.0, rows, "none")

    def loss(w, given):
        return followed(
            w,
            given,
            lambda w, x: head(w, x, layers, range(1, layers + 1), ()),
            lambda w, x: head(w, x, 2, (1, 2) if last_norm else (1,), ()),
            contrast,
        )

    return loss


def c2l(mode, sequential):
    """arXiv 2007.07423 as released: three losses, of which each may push its keys."""

    def loss(w, given):
        first, second = (given["views"][:, view] for view in range(2))
        teacher, order = given["teacher"], given["order"]

        def mixed(x):
            return given["share"] * x + (1 - given["share"]) * x[order]

        def keys(x):
            features = images(teacher["teacher_backbone"], x)
            return head(teacher["teacher_head"], features, 1, (), (1,))

        features = images(w["backbone"], first)
        query = head(w["head"], features, 1, (), (1,))
        mixed_query = head(w["head"], images(w["backbone"], mixed(first)), 1, (), (1,))
        key = keys(second)
        pairs = ((query, key), (mixed_query, keys(mixed(second))), (mixed_query, mixed(key)))
        queue, place, z, total = given["queue"], 0, None, 0
        for q, k in pairs:
            q, k = unit(q), unit(k)
            s = np.concatenate([np.sum(q * k, 1, keepdims=True), q @ queue.T], 1)
            s = s / given["temperature"]
            if mode == "infonce":
                total += np.mean(np.log(np.exp(s).sum(1)) - s[:, 0])
            else:
                z = stop(np.exp(s)).mean() * given["num_data"] if z is None else z
                o, m_p = np.exp(s) / z, len(queue) / given["num_data"]
                total -= np.mean(
                    np.log(o[:, 0] / (o[:, 0] + m_p + 1e-7))
                    + np.log(m_p / (o[:, 1:] + m_p + 1e-7)).sum(1)
                )
            if sequential:
                queue = np.concatenate([queue[:place], k, queue[place + len(k) :]])
                place += len(k)
        return total / len(pairs) + probe(w, features[:, None], given["labels"])

    return loss


def convirt(weight=0.75, duplicates="none", of_images=0.0, of_texts=0.0):
    """arXiv 2010.00747, equations 2 to 4; with a bias 2303.15343, equation 1.

    `of_images` and `of_texts` weigh the terms between the two views and the two texts of a row.
    """

    def loss(w, given):
        scale = np.exp(w["logit_scale"]) if "logit_scale" in w else 10.0
        features = images_of_row(w["backbone"], given["views"])
        v = [head(w["head"], features[:, k], 2, (), ()) for k in range(features.shape[1])]
        u, ids = [], given["text_id"].T
        for k in range(len(ids)):
            x = texts(w["text"], given["tokens"][:, k], given["token_mask"][:, k])
            u.append(head(w["text_head"], x, 2, (), ()))

        def contrast(x, y, weight, ids, duplicates):
            if "logit_bias" in w:
                return pair_oracle.sigmoid(x, y, scale, w["logit_bias"], ids, duplicates)
            return pair_oracle.infonce(x, y, scale, weight, ids, duplicates)

        pairs = [(x, y, i) for x in v for y, i in zip(u, ids, strict=True)]
        total = sum(contrast(x, y, weight, i, duplicates) for x, y, i in pairs) / len(pairs)
        if of_images:
            total += of_images * contrast(*v, 0.5, np.arange(len(v[0])), "none")
        if of_texts:
            total += of_texts * contrast(*u, 0.5, tuple(ids), duplicates)
        return total + probe(w, features, given["labels"])

    return loss
