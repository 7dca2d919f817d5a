from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F

from clip_cid.loss_table import LOSSES
from clip_cid.method.distill.center_pass import SoftCenters
from clip_cid.method.distill.contrastive import Side, contrastive_loss, instance_loss
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.method.distill.objective import Objective, Targets, weighted_sum
from clip_cid.method.distill.peer_losses import affinity_loss, feature_loss, one_way_instance_loss, siglip_loss

PAPER = {"clip": 1.0, "cluster_cls": 1.0, "cluster_kl": 1.0, "instance_image": 0.5, "instance_text": 0.5}
SCALE = torch.tensor(10.0)


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def batch(dim: int = 8, teacher_dim: int = 8) -> dict[str, Any]:
    return {
        "student_image": unit_rows(5, dim, 1),
        "student_text": unit_rows(5, dim, 2),
        "logit_scale": SCALE,
        "teacher_image": unit_rows(5, teacher_dim, 3),
        "teacher_text": unit_rows(5, teacher_dim, 4),
        "labels": torch.tensor([0, 3, 3, 19, 7]),
    }


def parts_of(
    objective: Objective,
    student_image: torch.Tensor,
    student_text: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
    logit_bias: torch.Tensor | None = None,
    **targets: Any,
) -> dict[str, torch.Tensor]:
    seen = {"image": student_image, "text": student_text, "logit_scale": logit_scale}
    seen |= objective.read(student_image, student_text) | ({} if logit_bias is None else {"logit_bias": logit_bias})
    return objective(seen, Targets(**targets), generator=generator)


def head_logits(rows: torch.Tensor, centers: torch.Tensor):
    return 16 * rows.double().numpy() @ centers.double().numpy().T


def native(**settings) -> Objective:
    of_texts = {"text_centers": unit_rows(9, 8, 10)}
    given: dict[str, Any] = {
        "losses": PAPER,
        "student_dim": 8,
        "teacher_dim": 8,
        "centers": unit_rows(20, 8, 0),
    } | of_texts
    return Objective(**given | settings)


def test_clusters_of_texts_and_of_the_other_modality_by_their_definitions():
    scales = {"text_cluster_kl": 5.0, "cross_cluster_image": 30.0, "cross_cluster_text": 40.0}
    losses = ["cluster_cls", "cluster_kl", "text_cluster_cls", *scales]
    objective = native(losses=losses, sample_rate=1.0, temperature=2.0, scales=scales)
    data: dict[str, Any] = batch() | {"text_labels": torch.tensor([1, 0, 8, 8, 2])}
    parts = parts_of(objective, **data)

    def logits(rows: str, of_texts: bool, scale: float) -> Any:
        centers = unit_rows(9, 8, 10) if of_texts else unit_rows(20, 8, 0)
        return scale * data[rows].double().numpy() @ centers.double().numpy().T

    texts, images = data["text_labels"].numpy(), data["labels"].numpy()
    expected = {
        "cluster_cls": oracles.cross_entropy(logits("student_image", False, 16), images),
        "cluster_kl": oracles.kl(logits("teacher_image", False, 16), logits("student_image", False, 16), 2.0),
        "text_cluster_cls": oracles.cross_entropy(logits("student_text", True, 5), texts),
        "text_cluster_kl": oracles.kl(logits("teacher_text", True, 5), logits("student_text", True, 5), 2.0),
        "cross_cluster_image": oracles.kl(logits("teacher_image", True, 30), logits("student_image", True, 30), 2.0),
        "cross_cluster_text": oracles.kl(logits("teacher_text", False, 40), logits("student_text", False, 40), 2.0),
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-5)
    seen = objective.diagnostics()
    assert (seen["centers"], seen["text_centers"]) == (20, 9)
    own = np.mean(logits("student_text", True, 5).argmax(axis=1) == texts)
    assert seen["text_own_center"] == pytest.approx(own)


def test_texts_that_are_the_images_have_the_losses_of_the_images():
    """With the images' centers, labels and vectors in place of their own, and all centers in the step."""
    objective = native(
        losses=["cluster_cls", "cluster_kl", "text_cluster_cls", "text_cluster_kl", "cross_cluster_image"],
        text_centers=unit_rows(20, 8, 0),
        sample_rate=1.0,
    )
    data = batch()
    data |= {"student_text": data["student_image"], "teacher_text": data["teacher_image"]}
    parts = parts_of(objective, **data, text_labels=data["labels"])
    assert parts["text_cluster_cls"] == parts["cluster_cls"]
    assert parts["text_cluster_kl"] == parts["cross_cluster_image"] == parts["cluster_kl"]


def test_clusters_of_texts_leave_the_sample_of_those_of_images_alone():
    data, generator = batch() | {"text_labels": torch.tensor([1, 0, 8, 8, 2])}, torch.Generator()
    found = [
        parts_of(native(losses=losses, sample_rate=0.5), **data, generator=generator.manual_seed(3))["cluster_cls"]
        for losses in (["cluster_cls"], ["cluster_cls", "text_cluster_cls", "cross_cluster_image"])
    ]
    assert found[0] == found[1]


def test_the_teacher_has_nothing_to_learn_from_itself_over_centers_of_texts():
    losses = ["text_cluster_kl", "cross_cluster_image", "cross_cluster_text"]
    data: dict[str, Any] = batch() | {"text_labels": torch.tensor([1, 0, 8, 8, 2])}
    data |= {"student_image": data["teacher_image"], "student_text": data["teacher_text"]}
    parts = parts_of(native(losses=losses, sample_rate=0.5), **data)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(dict.fromkeys(losses, 0.0), abs=1e-7)


def test_the_centers_of_texts_stay_where_they_are():
    objective = native(losses=["cluster_cls", "text_cluster_cls"], train_head=True, sample_rate=0.5)
    assert [name for name, value in objective.named_parameters() if value.requires_grad] == ["head.weight"]
    with pytest.raises(ValueError, match=r"text_centers must be \(K, 8\) for the losses of the clusters, got None"):
        native(losses=["text_cluster_cls"], text_centers=None)


def test_the_parts_are_the_losses_of_the_paper():
    data, objective = batch(), native(sample_rate=1.0, temperature=2.0)
    parts = parts_of(objective, **data)
    student, teacher = (head_logits(data[name], unit_rows(20, 8, 0)) for name in ("student_image", "teacher_image"))
    assert list(parts) == list(PAPER)
    assert parts["cluster_cls"].item() == pytest.approx(
        oracles.cross_entropy(student, data["labels"].numpy()), rel=1e-5
    )
    assert parts["cluster_kl"].item() == pytest.approx(oracles.kl(teacher, student, 2.0), rel=1e-5)
    sides = {name: Side.whole(value) for name, value in data.items() if value.ndim == 2}
    torch.testing.assert_close(parts["clip"], contrastive_loss(sides["student_image"], sides["student_text"], SCALE))
    scale = torch.tensor(1 / 0.07)
    torch.testing.assert_close(
        parts["instance_image"], instance_loss(sides["student_image"], sides["teacher_text"], scale)
    )
    torch.testing.assert_close(
        parts["instance_text"], instance_loss(sides["student_text"], sides["teacher_image"], scale)
    )


def test_the_parts_of_peers_are_their_losses():
    losses = ("siglip", "affinity", "feature", "icl")
    data: dict[str, Any] = batch() | {"logit_bias": torch.tensor(-3.0)}
    sides = {name: Side.whole(value) for name, value in data.items() if value.ndim == 2}
    student, teacher = ((sides[f"{who}_image"], sides[f"{who}_text"]) for who in ("student", "teacher"))
    for own in (None, 50.0):
        objective = native(losses=losses, teacher_scale=30.0, affinity_scale=own)
        parts = parts_of(objective, **data)
        scale = SCALE if own is None else torch.tensor(own)
        expected = {
            "siglip": siglip_loss(*student, SCALE, torch.tensor(-3.0)),
            "affinity": affinity_loss(*student, scale, *teacher, torch.tensor(30.0)),
            "feature": feature_loss(*student, *teacher),
            "icl": one_way_instance_loss(*student, *teacher, torch.tensor(1 / 0.07)),
        }
        torch.testing.assert_close(parts, expected)
        assert objective.head is None
    with pytest.raises(ValueError, match="logit_bias is missing"):
        parts_of(native(losses=losses), **batch())


def test_the_crossed_parts_may_share_the_students_scale():
    data, objective = batch(), native(share_scale=True, sample_rate=1.0)
    assert objective.instance_logit_scale is None
    sides = Side.whole(data["student_text"]), Side.whole(data["teacher_image"])
    torch.testing.assert_close(parts_of(objective, **data)["instance_text"], instance_loss(*sides, SCALE))


def test_what_compares_logits_alone_needs_no_common_width():
    data = batch(8, 12)
    objective = Objective(losses=["affinity"], student_dim=8)
    assert list(parts_of(objective, **data)) == ["affinity"]
    assert not list(objective.parameters())


def test_soft_centers_stand_for_the_teacher_in_the_divergence():
    data, objective = batch(), native(sample_rate=1.0, temperature=2.0)
    found = soft_centers(data["teacher_image"], unit_rows(20, 8, 0), scale=16.0, temperature=2.0)
    data["student_image"].requires_grad_()
    results = []
    for soft in (None, found):
        parts = parts_of(objective, **data, soft_centers=soft)
        (gradient,) = torch.autograd.grad(parts["cluster_kl"], data["student_image"])
        results.append((parts, gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    wrong = SoftCenters(found.mean, found.entropy + 0.1, found.sharpness)
    assert parts_of(objective, **data, soft_centers=wrong)["cluster_kl"].item() != results[0][0]["cluster_kl"].item()


@pytest.mark.parametrize("part", [loss.name for loss in LOSSES if loss.name != "siglip"])
def test_a_part_alone_is_built_and_computed_alone(part):
    needed = {
        "clip": set(),
        "cluster_cls": {"labels"},
        "cluster_kl": {"labels", "teacher_image"},
        "instance_image": {"teacher_text"},
        "instance_text": {"teacher_image"},
        "affinity": {"teacher_image", "teacher_text"},
        "feature": {"teacher_image", "teacher_text"},
        "icl": {"teacher_image", "teacher_text"},
        "cosine_image": {"teacher_image"},
        "cosine_text": {"teacher_text"},
        "bank_image": {"teacher_image", "bank_texts"},
        "bank_text": {"teacher_text", "bank_images"},
        "text_cluster_cls": {"text_labels"},
        "text_cluster_kl": {"text_labels", "teacher_text"},
        "cross_cluster_image": {"text_labels", "teacher_image"},
        "cross_cluster_text": {"labels", "teacher_text"},
    }[part]
    objective = native(losses=[part])
    data: dict[str, Any] = batch() | {"bank_images": unit_rows(9, 8, 5), "bank_texts": unit_rows(9, 8, 6)}
    data |= {"text_labels": torch.tensor([1, 0, 8, 8, 2])}
    given = {name: data[name] for name in ("student_image", "student_text", "logit_scale", *needed)}
    assert list(parts_of(objective, **given)) == [part]
    assert (objective.head is not None) == ("labels" in needed)
    assert (objective.text_head is not None) == ("text_labels" in needed)
    assert (objective.instance_logit_scale is not None) == (part in ("instance_image", "instance_text", "icl"))
    for name in needed:
        with pytest.raises(ValueError, match=f"{name} is missing, and a loss that is computed reads it"):
            parts_of(objective, **{key: value for key, value in given.items() if key != name})


def test_plain_clip_needs_no_teacher():
    objective = Objective(losses=["clip"], student_dim=8)
    assert list(objective.parameters()) == []
    assert list(parts_of(objective, unit_rows(5, 8, 1), unit_rows(5, 8, 2), SCALE)) == ["clip"]


def test_native_alignment_needs_equal_widths():
    with pytest.raises(ValueError, match="alignment native needs a student as wide as the teacher, 12, got 8"):
        native(teacher_dim=12, centers=unit_rows(20, 12, 0))


def test_linear_alignment_is_seen_by_the_distillation_parts_only():
    objective = native(teacher_dim=12, centers=unit_rows(20, 12, 0), alignment="linear", sample_rate=1.0)
    assert objective.image_map is not None
    assert objective.text_map is not None
    data = batch(8, 12)
    image = F.normalize(data["student_image"] @ objective.image_map.weight.T, dim=1)
    text = F.normalize(data["student_text"] @ objective.text_map.weight.T, dim=1)
    parts = parts_of(objective, **data)
    sides = Side.whole(data["student_image"]), Side.whole(data["student_text"])
    torch.testing.assert_close(parts["clip"], contrastive_loss(*sides, SCALE))
    expected = oracles.cross_entropy(head_logits(image.detach(), unit_rows(20, 12, 0)), data["labels"].numpy())
    assert parts["cluster_cls"].item() == pytest.approx(expected, rel=1e-5)
    for name, rows, teacher in (("image", image, "teacher_text"), ("text", text, "teacher_image")):
        expected = instance_loss(Side.whole(rows), Side.whole(data[teacher]), torch.tensor(1 / 0.07))
        torch.testing.assert_close(parts[f"instance_{name}"], expected)
    torch.testing.assert_close(image @ image.T, data["student_image"] @ data["student_image"].T)  # orthogonal at first


def test_linear_alignment_learns_one_map_where_only_images_are_compared():
    objective = native(losses=["cluster_cls"], teacher_dim=12, centers=unit_rows(20, 12, 0), alignment="linear")
    assert [name for name, p in objective.named_parameters() if p.requires_grad] == ["image_map.weight"]


def test_what_learns():
    learned = {name for name, p in native().named_parameters() if p.requires_grad}
    assert learned == {"instance_logit_scale"}
    learned = {name for name, p in native(train_head=True, alignment="linear").named_parameters() if p.requires_grad}
    assert learned == {"instance_logit_scale", "head.weight", "image_map.weight", "text_map.weight"}


def test_gradients_reach_all_that_learns_and_nothing_of_the_teacher():
    data, objective = batch(), native(train_head=True, alignment="linear", sample_rate=0.5)
    for name in ("student_image", "student_text", "teacher_image", "teacher_text"):
        data[name].requires_grad_()
    weighted_sum(parts_of(objective, **data), PAPER).backward()
    learned = [data["student_image"], data["student_text"], *objective.parameters()]
    assert all(tensor.grad is not None and tensor.grad.to_dense().abs().max() > 0 for tensor in learned)
    assert objective.head is not None
    assert objective.head.weight.grad is not None
    assert objective.head.weight.grad.is_sparse
    assert data["teacher_image"].grad is None
    assert data["teacher_text"].grad is None


def test_both_cluster_parts_see_one_sample_of_the_centers_and_the_generator_decides_it():
    data = batch()
    results = []
    for seed in (1, 1, 2):
        objective = native(sample_rate=0.5)
        parts = parts_of(objective, **data, generator=torch.Generator().manual_seed(seed))
        assert objective.diagnostics()["centers"] == 10
        assert objective.diagnostics()["negatives"] == 6
        results.append((parts["cluster_cls"].item(), parts["cluster_kl"].item()))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("logq", "corrected"), [("none", set()), ("kl", {"cluster_kl"}), ("both", {"cluster_cls", "cluster_kl"})]
)
def test_logq_corrects_the_parts_it_names(logq, corrected):
    def parts(logq):
        return parts_of(native(sample_rate=0.5, logq=logq), **batch(), generator=torch.Generator().manual_seed(0))

    plain, found = parts("none"), parts(logq)
    assert {name for name in PAPER if plain[name].item() != found[name].item()} == corrected


def test_stored_embeddings_are_read_at_unit_length():
    data, objective = batch(), native(sample_rate=1.0)
    expected = parts_of(objective, **data)
    for name in ("teacher_image", "teacher_text"):
        data[name] = (1.004 * data[name]).half()
    torch.testing.assert_close(parts_of(objective, **data), expected, rtol=1e-2, atol=1e-3)
    for name in ("teacher_image", "teacher_text"):
        data[name] = 3 * batch()[name]
    torch.testing.assert_close(parts_of(objective, **data), expected)


def test_the_instance_scale_starts_at_one_over_0_07_and_stops_at_100():
    objective = native()
    scale = objective.instance_logit_scale
    assert scale is not None
    assert scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        scale.fill_(9.0)
    objective.clamp_scale()
    parts_of(objective, **batch())["instance_text"].backward()
    assert scale.exp().item() == pytest.approx(100)
    assert scale.grad is not None
    assert scale.grad.item() != 0  # so that it can come back


def test_diagnostics_name_a_sick_run():
    data, objective = batch(), native(sample_rate=1.0, train_head=True)
    assert objective.head is not None
    data["student_image"] = objective.head.rows()[data["labels"]].detach()
    parts_of(objective, **data)
    found = objective.diagnostics()
    assert found.keys() == {"mean_image_norm", "own_center", "centers", "negatives", "head_drift", "instance_scale"}
    assert (found["own_center"], found["head_drift"], found["centers"], found["negatives"]) == (1, 0, 20, 16)
    data["student_image"] = unit_rows(1, 8, 5).expand(5, 8)
    parts_of(objective, **data)
    assert objective.diagnostics()["mean_image_norm"] == pytest.approx(1)
    assert objective.diagnostics()["own_center"] < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_parts_are_computed_in_float32_under_autocast(dtype):
    data, objective = batch(8, 12), native(teacher_dim=12, centers=unit_rows(20, 12, 0), alignment="linear")
    half = {name: value.to(dtype) if value.ndim == 2 else value for name, value in data.items()}
    plain = parts_of(objective, **{name: value.float() if value.ndim == 2 else value for name, value in half.items()})
    with torch.autocast("cpu", dtype=dtype):
        found = parts_of(objective, **half)
    assert {part.dtype for part in found.values()} == {torch.float32}
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


@pytest.mark.resume
def test_the_state_goes_on_where_it_was():
    first, second = native(train_head=True, alignment="linear"), native(train_head=True, alignment="linear")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)
    second.load_state_dict(first.state_dict())
    data = batch()
    torch.testing.assert_close(parts_of(first, **data), parts_of(second, **data), rtol=0, atol=0)


def test_a_few_steps_bring_the_student_nearer_to_its_centers():
    torch.manual_seed(0)
    data, objective = batch(), native(sample_rate=1.0)
    image = torch.nn.Parameter(data["student_image"].clone())
    optimizer = torch.optim.Adam([image, *objective.parameters()], lr=0.05)
    losses = []
    parts_of(objective, **data)
    before = objective.diagnostics()["own_center"]
    for _ in range(25):
        parts = parts_of(objective, **{**data, "student_image": F.normalize(image, dim=1)})
        loss = weighted_sum(parts, PAPER)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert objective.diagnostics()["own_center"] > before


def test_the_sum_is_weighted_by_name():
    parts = {"clip": torch.tensor(2.0), "instance_text": torch.tensor(3.0)}
    assert weighted_sum(parts, {**PAPER, "clip": 0.25}).item() == 2.0
    with pytest.raises(ValueError, match="weights must name every loss"):
        weighted_sum(parts, {"clip": 1.0})
    with pytest.raises(ValueError, match="weights must name every loss"):
        weighted_sum({}, PAPER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": []}, "there are no losses"),
        ({"losses": ["alpha"]}, "losses must be of clip, .*, cross_cluster_text, got alpha"),
        ({"teacher_dim": None}, "teacher_dim is needed by the losses that compare"),
        ({"centers": None}, r"centers must be \(K, 8\) for the losses of the clusters, got None"),
        ({"centers": torch.eye(9)}, r"centers must be \(K, 8\) for the losses of the clusters, got \(9, 9\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        native(**settings)
