"""Which records are asked about in place of those whose groups have no spread, and so nothing to teach.

DAPO's dynamic sampling (arXiv:2503.14476), up to a stated number of prompts a step. The spare records of a step follow
from the data order and the step alone, like its own: nothing of them has a place in checkpoints.
"""

from collections.abc import Iterator

from medground.data_order import DataOrder
from medground.loading import Question

_FIRST = 1 << 40  # of the data order: far beyond the positions of any run


def spare_questions(order: DataOrder, step: int, prompts: int, most: int) -> Iterator[Question]:
    """Questions about records that are not in the step, each once, until there are no others.

    A record of the step would draw the same completions again, since they depend on the record.

    Args:
        order: of training.
        step: whose position in the order is step * prompts.
        prompts: of a step (B).
        most: that any step may ask for; so far apart are two steps' places in the order.
    """
    asked = {order[position].id for position in range(step * prompts, (step + 1) * prompts)}
    start = _FIRST + step * most
    for position in range(start, start + 2 * len(order)):
        if order[position].id not in asked:
            asked.add(order[position].id)
            yield Question(order[position], position=position)
