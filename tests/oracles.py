"""Slow, obvious versions of the method in float64, to check the fast ones against. They share no code with them."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def distance(a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """Of two unit vectors, summed without rounding."""
    squared = math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))
    return {"cosine": squared / 2, "squared_euclidean": squared, "euclidean": math.sqrt(squared)}[metric]


def connected_sets(size: int, edges: list[tuple[int, int]]) -> list[list[int]]:
    """Breadth first, from every number not yet reached."""
    neighbours: dict[int, list[int]] = {node: [] for node in range(size)}
    for a, b in edges:
        neighbours[a].append(b)
        neighbours[b].append(a)
    sets, reached = [], set()
    for start in range(size):
        if start in reached:
            continue
        reached.add(start)
        queue = [start]
        for node in queue:
            for other in neighbours[node]:
                if other not in reached:
                    reached.add(other)
                    queue.append(other)
        sets.append(sorted(queue))
    return sets


def spanning_forest(rows: np.ndarray, limit: float) -> tuple[list[tuple[int, int]], list[float]]:
    """Kruskal over all pairs of unit rows at a squared distance up to `limit`: the links, nearest first, and their distances."""
    pairs = [(float(((rows[i] - rows[j]) ** 2).sum()), i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    label = list(range(len(rows)))
    links, squared = [], []
    for distance, i, j in sorted(pairs):
        if distance <= limit and label[i] != label[j]:
            links.append((i, j))
            squared.append(distance)
            label = [label[i] if one == label[j] else one for one in label]
    return links, squared


def balance(
    embeddings: np.ndarray, threshold: float, metric: str, texts: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """The rows kept, and for each row its place among them."""
    rows = unit(embeddings)
    edges = [
        (i, j)
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if distance(rows[i], rows[j], metric) <= threshold
    ]
    sets = connected_sets(len(rows), edges)
    keepers = [_keeper(members, rows, None if texts is None else unit(texts)) for members in sets]
    kept = sorted(keepers)
    set_of = [0] * len(rows)
    for members, keeper in zip(sets, keepers, strict=True):
        for row in members:
            set_of[row] = kept.index(keeper)
    return kept, set_of


def _keeper(members: list[int], rows: np.ndarray, texts: np.ndarray | None) -> int:
    centroid = rows[members].mean(axis=0)
    distances = {row: float(np.sqrt(((rows[row] - centroid) ** 2).sum())) for row in members}
    tied = [row for row in members if distances[row] <= min(distances.values()) + 1e-9]
    if texts is not None:
        cosines = {row: float((rows[row] * texts[row]).sum()) for row in tied}
        tied = [row for row in tied if cosines[row] >= max(cosines.values()) - 1e-9]
    return min(tied)


def nearest(embeddings: np.ndarray, centers: np.ndarray) -> list[int]:
    """The center of the greatest cosine, the lowest of those equal within 1e-9."""
    labels = []
    for row in unit(embeddings):
        cosines = [float((row * center).sum()) for center in unit(centers)]
        labels.append(next(j for j, cosine in enumerate(cosines) if cosine >= max(cosines) - 1e-9))
    return labels


def kmeans_objective(embeddings: np.ndarray, centers: np.ndarray, labels: np.ndarray) -> float:
    return float(((unit(embeddings) - unit(centers)[labels]) ** 2).sum(axis=1).mean())


def spherical_kmeans(embeddings: np.ndarray, centers: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's rounds from given centers; a center without rows stays."""
    rows, centers = unit(embeddings), unit(centers)
    for _ in range(iterations):
        labels = (rows @ centers.T).argmax(axis=1)
        for j in range(len(centers)):
            if (labels == j).any():
                centers[j] = unit(rows[labels == j].sum(axis=0)[None])[0]
    return centers, (rows @ centers.T).argmax(axis=1)


def even_shares(total: int, sizes: list[int]) -> list[int]:
    """A row after the other is given by one that has given least so far and has rows left; sorted."""
    given = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        node = min((node for node, size in enumerate(sizes) if given[node] < size), key=lambda node: given[node])
        given[node] += 1
    return sorted(given)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Each row by itself, summed without rounding."""
    out = np.empty_like(logits, dtype=np.float64)
    for row, values in enumerate(np.asarray(logits, dtype=np.float64)):
        top = float(values.max())
        out[row] = values - top - math.log(math.fsum(math.exp(float(value) - top) for value in values))
    return out


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return -float(np.mean([row[label] for row, label in zip(log_softmax(logits), labels, strict=True)]))


def one_way(queries: np.ndarray, keys: np.ndarray, scale: float) -> float:
    """Each query looks for the key of its own number."""
    return cross_entropy(batch_logits(queries, keys, scale), np.arange(len(queries)))


def contrastive(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    return (one_way(a, b, scale) + one_way(b, a, scale)) / 2


def batch_logits(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    return scale * (np.asarray(a, dtype=np.float64) @ np.asarray(b, dtype=np.float64).T)


def siglip(image: np.ndarray, text: np.ndarray, scale: float, bias: float) -> float:
    """Pair by pair: -log of the probability that it is what it is."""
    total = []
    for i, row in enumerate(batch_logits(image, text, scale) + bias):
        for j, logit in enumerate(row):
            wrong = -float(logit) if i == j else float(logit)
            total.append(max(wrong, 0.0) + math.log1p(math.exp(-abs(wrong))))
    return math.fsum(total) / len(image)


def kl(teacher_logits: np.ndarray, student_logits: np.ndarray, temperature: float) -> float:
    """KL(teacher || student), the mean over rows; the sums are exact."""
    p = log_softmax(np.asarray(teacher_logits, dtype=np.float64) / temperature)
    q = log_softmax(np.asarray(student_logits, dtype=np.float64) / temperature)
    return float(np.mean([math.fsum(np.exp(a) * (a - b)) for a, b in zip(p, q, strict=True)]))


def several_labels_dense(
    student: torch.Tensor,
    centers: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float,
    ignore_near: float | None = None,
    log_inclusion: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_cls of several labels a row, each label with each negative; autograd gives the gradients of both sides."""
    student, centers = student.double(), centers.double()
    shift = torch.zeros(len(centers), dtype=torch.float64) if log_inclusion is None else log_inclusion.double()
    losses = []
    for row, own in zip(student, labels.tolist(), strict=True):
        logits = scale * centers @ row - shift
        near = torch.zeros(len(centers), dtype=torch.bool)
        if ignore_near is not None:
            near = (centers @ centers[own].T > ignore_near).any(dim=1)
        negatives = [column for column in range(len(centers)) if column not in own and not near[column]]
        differences = [logits[negative] - logits[positive] for negative in negatives for positive in own]
        losses.append(torch.logsumexp(torch.stack([torch.zeros((), dtype=torch.float64), *differences]), dim=0))
    return torch.stack(losses).mean()


def cluster_losses_dense(
    student: torch.Tensor,
    centers: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor,
    *,
    scale: float,
    temperature: float = 1.0,
    log_inclusion: torch.Tensor | None = None,
    logq: str = "kl",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both cluster losses from whole matrices of logits; autograd gives the gradients of student and centers."""
    student, centers, teacher = student.double(), centers.double(), teacher.detach().double()
    shift = torch.zeros(len(centers), dtype=torch.float64) if log_inclusion is None else log_inclusion.double()
    of_student, of_teacher = scale * student @ centers.T, scale * teacher @ centers.detach().T
    cls = F.cross_entropy(of_student - shift if logq == "both" else of_student, labels)
    if logq == "none":
        shift = torch.zeros_like(shift)
    log_q = F.log_softmax(of_student / temperature - shift, dim=1)
    log_p = F.log_softmax(of_teacher / temperature - shift, dim=1)
    return cls, F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
