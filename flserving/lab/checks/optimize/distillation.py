"""Check of the exercise "softened targets" (notebook 09)."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Loss: TypeAlias = Callable[..., Any]
Pair: TypeAlias = tuple[Tensor, Tensor]


def check_distillation(distillation_loss: Loss) -> None:
    """Check ``distillation_loss(student, teacher, temperature, labels=None, label_share=0.0)``.

    Right is ``(1 - label_share) T^2 CE(softmax(teacher / T), student / T) + label_share CE(labels,
    student)``, the mean of the rows. The Kullback-Leibler divergence is right as well: no weight of
    the student changes the difference.

    Raises:
        CheckError: Recognises the usual mistakes by the number that they give.
    """
    judge(
        "softened-targets",
        distillation_loss,
        Part(
            "at temperature 1",
            _plain,
            (
                "The targets are the teacher's probabilities, softmax(teacher), and not its best class.",
                "For each row minus the sum over the classes of target * log_softmax(student); then the mean of rows.",
            ),
        ),
        Part(
            "softened by T",
            _softened,
            (
                "Both are divided by T before their softmax: `teacher / temperature`, `student / temperature`.",
            ),
        ),
        Part(
            "gradients of one size",
            _gradients,
            (
                "T appears twice in the gradient as 1 / T: multiply the soft part by `temperature**2`.",
            ),
        ),
        Part(
            "labels where there are some",
            _labels,
            (
                "The labels' part is the plain cross entropy, at temperature 1, times label_share.",
                "`torch.log_softmax(student, dim=1)[torch.arange(len(labels)), labels]`, minus its mean.",
            ),
        ),
        Part(
            "the teacher stays as it is",
            _teacher_stays,
            ("`teacher.detach()` is the teacher's answer without its history.",),
        ),
        Part(
            "sure answers",
            _sure,
            (
                "log(softmax(x)) is log(0) where an answer is sure; `torch.log_softmax(x, dim=1)` is not.",
            ),
        ),
    )


def _logits() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(4)
    student = 2 * torch.randn(6, 5, generator=source)
    teacher = 3 * torch.randn(6, 5, generator=source)
    return student, teacher, torch.tensor([0, 1, 2, 3, 4, 0])


def _entropy(logits: Tensor) -> Tensor:
    return cross_entropy(logits, logits.softmax(dim=1))


def _asked(distillation_loss: Loss, *arguments: Any) -> Tensor:
    got = ask("distillation_loss(student, teacher, ...)", distillation_loss, *arguments)
    assert isinstance(got, Tensor), (
        f"the loss is a {type(got).__name__}: a tensor, which backward() can start from"
    )
    assert got.ndim == 0, (
        f"the loss has the shape {tuple(got.shape)}: one number, the mean over the rows"
    )
    return got


def _is(got: Tensor, *right: Tensor) -> bool:
    return any(torch.isclose(got, one, rtol=1e-4, atol=1e-6) for one in right)


def _expect(got: Tensor, what: str, right: Pair, mistakes: dict[str, Pair]) -> None:
    """Each pair is a cross entropy, and what is subtracted from it where somebody took the
    divergence."""
    if _is(got, right[0], right[0] - right[1]):
        return
    for why, (wrong, entropy) in mistakes.items():
        assert not _is(got, wrong, wrong - entropy), f"{what} the loss is {got:.4g}, {why}"
    raise AssertionError(
        f"{what} the loss is {got:.4g}; cross entropy to the soft targets gives {right[0]:.4g}"
    )


def _plain(distillation_loss: Loss) -> None:
    student, teacher, _ = _logits()
    got = _asked(distillation_loss, student, teacher, 1.0)
    targets = teacher.softmax(dim=1)
    logs = student.log_softmax(dim=1)
    right = cross_entropy(student, targets)
    entropy = _entropy(teacher)
    none = torch.zeros(())
    _expect(
        got,
        "At temperature 1",
        (right, entropy),
        {
            "negative: minus the sum of targets times logarithms": (-right, -entropy),
            "the sum of the rows: take their mean, or a larger batch takes larger steps": (
                6 * right,
                6 * entropy,
            ),
            "a mean over rows and classes: sum over the classes": (right / 5, entropy / 5),
            "of the teacher's best class: then only the winner is taught, not how near the others are": (
                cross_entropy(student, teacher.argmax(dim=1)),
                none,
            ),
            "with teacher and student exchanged: the student's logarithms, the teacher's probabilities": (
                cross_entropy(teacher, student.softmax(dim=1)),
                _entropy(student),
            ),
            "a squared difference of logits: compare probabilities": (
                (student - teacher).square().mean(),
                none,
            ),
            "a softmax over the rows: dim=1 are the classes": (
                -(teacher.softmax(dim=0) * student.log_softmax(dim=0)).sum(dim=1).mean(),
                none,
            ),
            "of raw logits as targets: softmax makes probabilities of them": (
                -(teacher * logs).sum(dim=1).mean(),
                none,
            ),
        },
    )


def _softened(distillation_loss: Loss) -> None:
    student, teacher, _ = _logits()
    got = _asked(distillation_loss, student, teacher, 4.0)
    targets = (teacher / 4).softmax(dim=1)
    right = cross_entropy(student / 4, targets)
    mistakes = {
        "the student is not softened": cross_entropy(student, targets),
        "the teacher is not softened": cross_entropy(student / 4, teacher.softmax(dim=1)),
        "logits are multiplied by T: that makes answers surer, divide": cross_entropy(
            4 * student, (4 * teacher).softmax(dim=1)
        ),
        "nothing is softened": cross_entropy(student, teacher.softmax(dim=1)),
    }
    entropy = _entropy(teacher / 4)
    for factor in (1, 4, 16):  # what the factor must be is judged by itself
        if _is(got, factor * right, factor * (right - entropy)):
            return
        for why, wrong in mistakes.items():
            assert not _is(got, factor * wrong), f"At temperature 4 the loss is {got:.4g}: {why}"
    raise AssertionError(
        f"At temperature 4 the loss is {got:.4g}; T^2 times the softened one is {16 * right:.4g}"
    )


def _gradients(distillation_loss: Loss) -> None:
    student, teacher, _ = _logits()
    lengths = {}
    for temperature in (8.0, 32.0):
        logits = student.clone().requires_grad_()
        loss = _asked(distillation_loss, logits, teacher, temperature)
        assert loss.requires_grad, (
            "the loss knows nothing of the student: no .detach(), .item() or numpy on its way"
        )
        lengths[temperature] = float(torch.autograd.grad(loss, logits)[0].norm())
    ratio = lengths[32.0] / max(lengths[8.0], 1e-12)
    told = f"from T = 8 to T = 32 the gradient becomes {ratio:.2g} times as long"
    assert ratio > 0.2, (
        f"{told}: it falls as 1 / T^2, so a softer lesson would teach less; multiply by T^2"
    )
    assert ratio > 0.5, f"{told}: the factor is T^2, not T"
    assert ratio < 2, f"{told}: the factor is T^2"


def _labels(distillation_loss: Loss) -> None:
    student, teacher, labels = _logits()
    soft = 4 * cross_entropy(student / 2, (teacher / 2).softmax(dim=1))
    entropy = 4 * _entropy(teacher / 2)
    hard = cross_entropy(student, labels)
    got = _asked(distillation_loss, student, teacher, 2.0, labels, 0.25)
    softened = cross_entropy(student / 2, labels)
    _expect(
        got,
        "With a quarter for the labels",
        (0.75 * soft + 0.25 * hard, 0.75 * entropy),
        {
            "with the shares exchanged: label_share is that of the labels": (
                0.25 * soft + 0.75 * hard,
                0.25 * entropy,
            ),
            "without the labels": (soft, entropy),
            "the soft part with its full weight: it gets 1 - label_share": (
                soft + 0.25 * hard,
                entropy,
            ),
            "with softened labels' part: compare with labels at temperature 1": (
                0.75 * soft + 0.25 * softened,
                0.75 * entropy,
            ),
            "with T^2 on the labels' part, too": (0.75 * soft + hard, 0.75 * entropy),
        },
    )


def _teacher_stays(distillation_loss: Loss) -> None:
    student, teacher, _ = _logits()
    teacher.requires_grad_()
    loss = _asked(distillation_loss, student.requires_grad_(), teacher, 2.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None or not teacher.grad.any(), (
        "the loss has a gradient for the teacher: in a training it would learn to be as easy as the student; detach it"
    )


def _sure(distillation_loss: Loss) -> None:
    student = torch.tensor([[200.0, 0.0, 0.0]])
    got = _asked(distillation_loss, student, student.clone(), 1.0)
    assert torch.isfinite(got), (
        f"where both are sure of a class, the loss is {got}: log(0) is minus infinity"
    )
