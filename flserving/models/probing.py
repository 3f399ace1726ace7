"""What a model shows before it may serve: it answers rows, each by itself, as its signature
says."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from flserving.errors import InvalidModelError, ModelExecutionError
from flserving.models.processing import Postprocessor

Shape = tuple[int, ...]
Forward = Callable[[Tensor], Tensor]
TOLERANCE = 1e-3
"""Largest difference between a row's outputs alone and in a batch, as a share of the row's largest
output. Products of other shapes sum in another order: 1e-6 is usual in float32, and what rows tell
of each other is seldom under 1e-1."""
QUANTISED_TOLERANCE = 0.1
"""The same where numbers of few bits are computed with: rounding differently once moves them by a
whole step."""
# of the tolerance, as a share of the batch's largest output: a row's own outputs may be all but
# zero
_FLOOR = 0.1

_OVERFLOWS = 1e30
"""Sums of such sizes end at infinity, at no number or still below both, as the order of their terms
has it: two answers that are all of this kind say nothing of each other."""
_FAST = ((2,), (7,), (5,), (4, 0), (6, 3, 1))
"""Which rows go together, beside all eight at once: one, two and three, each in another company and
at another place than among the eight; small ones alone, usual ones alone, a large one alone."""


@lru_cache(maxsize=32)
def probe_rows(shape: Shape) -> Tensor:
    """Eight rows, float32 [8, *shape], always the same: normal ones (0, 4, 7), zeros (1), small and
    large ones (5, 2), zeros and ones (3), fractions (6)."""
    source = torch.Generator().manual_seed(20_250_101)
    rows = torch.randn(8, *shape, generator=source)
    rows[1] = 0
    rows[2] *= 30
    rows[5] *= 0.03
    rows[3] = torch.randint(2, shape, generator=source).float()
    rows[6] = torch.rand(shape, generator=source)
    return rows


def check_rows(module: Forward, shape: Shape, tolerance: float = TOLERANCE) -> None:
    """Refuse a module in which rows see each other: one caller's answer would depend on, and tell
    of, another's rows.

    Eight rows of several scales are answered together, and again one, two and three at a time.

    A probe sees what these rows show. It cannot see what only other values, or batches of more than
    eight rows, would bring about, what is smaller than the tolerance, or what is done on purpose to
    look harmless here.

    Args:
        module: Maps standardised rows float32 [N, *shape] to outputs [N, ...].

    Raises:
        InvalidModelError: A row is answered otherwise in other company; or it is answered otherwise
            each time; or some rows are answered, but not together.
        ModelExecutionError: None of the rows is answered.

    Cost: six forwards of 16 rows in all; eight more where a row is refused (word numbers, say, are
    no fractions).
    """
    rows = probe_rows(shape)
    try:
        _compare(module, rows, _FAST, tolerance)
    except (InvalidModelError, ModelExecutionError):
        raise
    except Exception:
        answered = [
            place for place in range(len(rows)) if _answers(module, rows[place : place + 1])
        ]
        if not answered:
            _answer(module, rows[1:2])  # raises, and tells why
            raise ModelExecutionError(
                "it answers now what it refused before: it must keep no state"
            ) from None
        alone = tuple((place,) for place in range(len(answered)))
        try:
            _compare(module, rows[answered], alone, tolerance)
        except (InvalidModelError, ModelExecutionError):
            raise
        except Exception as error:
            raise InvalidModelError(
                f"it answers a row alone, but not {len(answered)} at once ({_short(error)}): the first dimension must "
                "be the batch, of any size"
            ) from error


def check_answer(
    module: nn.Module, shape: Shape, outputs: Shape, postprocessor: Postprocessor | None
) -> None:
    """Answer a row of zeros as a server would. ``outputs``: the declared shape of a row's outputs.
    Without a ``postprocessor`` the numbers do not matter, only their shape.

    Raises:
        InvalidModelError: It fails, is not finite, or answers another shape than it declares.
    """
    try:
        values = _answer(module, torch.zeros(1, *shape))
    except Exception as error:
        raise InvalidModelError(
            f"it does not answer a row of shape {list(shape)} ({_short(error)}): it must take float32 "
            f"[{', '.join(map(str, ('N', *shape)))}]"
        ) from error
    found = tuple(values.shape[1:])
    if found != outputs and {found, outputs} != {(), (1,)}:
        raise InvalidModelError(
            f"it declares outputs of shape {list(outputs)} a row and answers {list(found)}"
        )
    try:
        if postprocessor is not None:
            postprocessor(values)
    except ModelExecutionError as error:
        raise InvalidModelError(f"a row of zeros: {error}") from error


def tolerance_of(module: nn.Module) -> float:
    """How much a module's arithmetic may round: see ``TOLERANCE``. A module may say it itself, as
    ``rounds_by``."""
    said = getattr(module, "rounds_by", None)
    if isinstance(said, float):
        return said
    tolerance = TOLERANCE
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype.is_floating_point:
            rounding = 16 * torch.finfo(tensor.dtype).eps
            tolerance = max(tolerance, min(0.25, rounding))
    return tolerance


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _answers(module: Forward, rows: Tensor) -> bool:
    try:
        _answer(module, rows)
    except Exception:
        return False
    return True


def _answer(module: Forward, rows: Tensor) -> Tensor:
    """Outputs [N, ...] for a copy of the rows: a module may work in place."""
    with torch.inference_mode():
        values = torch.as_tensor(module(rows.clone()))
    if not values.dim() or len(values) != len(rows):
        raise InvalidModelError(
            f"it answers shape {list(values.shape)} to {len(rows)} rows: it must give one row of outputs each"
        )
    return values


def _compare(
    module: Forward, rows: Tensor, groups: tuple[tuple[int, ...], ...], tolerance: float
) -> None:
    together = _answer(module, rows)
    places = [place for group in groups for place in group]
    found = [_answer(module, rows[list(group)]) for group in groups]
    answers = (together, *found)
    if len({values.shape[1:] for values in answers}) > 1:
        shapes = sorted({tuple(values.shape) for values in answers})
        raise InvalidModelError(
            f"the shape of a row's outputs depends on the other rows: batches answer {shapes}"
        )
    gap = _gap(torch.cat(found), together[places], together)
    if gap <= tolerance:
        return
    if _gap(_answer(module, rows), together, together) > tolerance:
        raise InvalidModelError(
            "it answers the same rows otherwise each time: no random numbers and no state in a forward"
        )
    raise InvalidModelError(
        f"its rows see each other: a row's outputs differ by {gap:.1e} of their size with the rows that are beside it "
        f"(up to {tolerance:.0e} is rounding), so one caller's answer would depend on another's rows; compute each row "
        "by itself (normalise, sort, pool and recur over a row's own dimensions, never over dimension 0)"
    )


def _gap(found: Tensor, wanted: Tensor, batch: Tensor) -> float:
    """The largest difference of two answers to the same rows, as a share of the size of each row's
    outputs."""
    found, wanted, batch = (
        values.detach().double().reshape(len(values), -1) for values in (found, wanted, batch)
    )
    if torch.equal(found, wanted):
        return 0.0
    overflown = [~values.isfinite() | (values.abs() > _OVERFLOWS) for values in (found, wanted)]
    gap = (found - wanted).abs()
    gap.masked_fill_((found == wanted) | (overflown[0] & overflown[1]), 0.0)
    largest = batch.nan_to_num(0.0, 0.0, 0.0).abs().max()
    sizes = wanted.nan_to_num(0.0, 0.0, 0.0).abs().amax(1, keepdim=True)
    sizes += _FLOOR * largest
    share = (gap / sizes).nan_to_num(torch.inf)
    # 0 / 0: all of a row's outputs are zero, or none is a number
    return float(share.masked_fill(gap == 0, 0.0).max())
